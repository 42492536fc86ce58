"""``speclm webui``: a chat page in the browser."""

import socket
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from speclm.cli._models import Loaded, load_with_heads
from speclm.cli._options import BUNDLED_HEADS, WebuiOptions
from speclm.demo.bundle import assets, load_prompts
from speclm.errors import OptionError
from speclm.methods.registry import heads_names
from speclm.model import SpecModel
from speclm.webui import Methods, Settings

if TYPE_CHECKING:
    from speclm.webui.page import Example


def webui(options: WebuiOptions) -> None:
    """Serve the page until it is interrupted."""
    if find_spec("gradio") is None:
        raise OptionError(
            "speclm webui needs gradio, which is not installed; run: pip install 'speclm[webui]'"
        )
    from speclm.webui.page import build_app, serve

    if options.base is None and options.threads is None:
        options = replace(options, threads=1)  # suits the bundled model; the page needs a core too
    console = Console(stderr=True)
    with listen(options.host, options.port) as listener:  # before anything that takes time
        loaded = load_with_heads(options)
        methods = Methods(loaders(options, loaded), loaded.tokenizer)
        with console.status("decoding once, as the first call is slow"):
            methods.warm_up(methods.names[0])
        app = build_app(
            methods,
            Settings(
                method=methods.names[0],
                system=options.system or "",
                temperature=options.temperature,
                top_p=options.top_p,
                top_k=options.top_k,
                max_new_tokens=options.max_new_tokens,
                seed=options.seed,
            ),
            title="bundled model" if options.base is None else Path(options.base).absolute().name,
            examples=bundled_examples() if options.base is None else (),
        )
        host, port = listener.getsockname()[:2]
        name = f"[{host}]" if ":" in host else host
        if not ip_address(host).is_loopback:
            console.print("there is no password: who can reach this address can use the page")
        console.print(f"http://{name}:{port}/ shows the page; Ctrl-C ends", highlight=False)
        serve(app, listener)


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens.

    Args:
        host: Name or address of this machine.
        port: Port; 0 for a free one.

    Raises:
        OptionError: If the port is in use or may not be used, or the host is not of this machine.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError, UnicodeError) as error:  # UnicodeError: no name of a host
        raise OptionError(
            f"--host {host!r} and --port {port} cannot be listened on ({error}); pass another "
            "--port, or --port 0 for a free one"
        ) from error


def loaders(options: WebuiOptions, loaded: Loaded) -> dict[str, Callable[[], SpecModel]]:
    """Return what loads each method that the page offers, that of ``--heads`` first.

    The others are those that need no files and, for the bundled base, the bundled heads.
    """
    is_bundled = options.base is None
    own = options.heads or ("draft" if is_bundled else "lookup")
    found: dict[str, Callable[[], SpecModel]] = {own: lambda: loaded.spec}
    bundled = {name: assets()[name] for name in BUNDLED_HEADS} if is_bundled else {}
    for name in (*bundled, *heads_names()):
        heads = bundled.get(name, name)
        found.setdefault(
            name,
            partial(SpecModel.from_pretrained, loaded.base, heads, engine=options.engine),
        )
    return found


def bundled_examples() -> "Sequence[Example]":
    """Return questions that the bundled model knows how to answer."""
    from speclm.webui.page import Example

    ((schema, question),) = load_prompts("sql_dev", limit=1)
    ((first,), (second,)) = load_prompts("gsm8k_dev", limit=2)
    return [
        Example("Text to SQL", question["content"], schema["content"]),
        Example("Arithmetic", second["content"]),
        Example("A longer problem", first["content"]),
    ]
