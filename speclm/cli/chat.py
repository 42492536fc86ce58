"""``speclm chat``: a conversation in the terminal."""

import io
import sys
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from speclm.chat import Chat
from speclm.cli._chat_loop import ChatLoop, read_piped, read_typed
from speclm.cli._models import HeadsRevision, load
from speclm.cli._options import MOST, Seed
from speclm.errors import OptionError


def chat(  # noqa: PLR0913, PLR0917 - each is an option of the command
    base: Annotated[
        str | None, typer.Argument(help="Folder or hub id; by default the bundled model.")
    ] = None,
    heads: Annotated[
        str | None,
        typer.Option(help='Proposer name, folder or hub id of a draft model, or "none".'),
    ] = None,
    heads_revision: HeadsRevision = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float16, auto.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, max=MOST, help="Of each answer.")] = 512,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 decodes greedily.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0)] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, max=MOST, help="0 for no bound.")] = 0,
    seed: Seed = 0,
    system: Annotated[str | None, typer.Option(help="Text of a system message.")] = None,
    show_accepted: Annotated[
        bool, typer.Option("--show-accepted", help="Colour tokens that were drafted and accepted.")
    ] = False,
) -> None:
    """Chat with a model; /help lists the commands. Piped input is answered line by line."""
    if sys.stdin is None:
        raise OptionError("standard input is closed; open it, or use: speclm generate")
    is_terminal = sys.stdin.isatty() and sys.stdout is not None and sys.stdout.isatty()
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # a wrong byte is no reason to end
    loaded = load(base, heads, dtype=dtype, heads_revision=heads_revision)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0.0}
    if temperature > 0.0:
        options.update(temperature=temperature, top_p=top_p, top_k=top_k)
    conversation = Chat(loaded.spec, loaded.tokenizer, system=system, options=options)
    torch.manual_seed(seed)
    # None lets rich find out, which knows NO_COLOR too.
    console = Console(force_terminal=None if is_terminal else False, highlight=False)
    loop = ChatLoop(
        conversation,
        console,
        Console(stderr=True, force_terminal=None if is_terminal else False, highlight=False),
        read_typed if is_terminal else read_piped,
        shows_accepted=show_accepted,
    )
    if is_terminal:
        proposer = type(loaded.spec.proposer).__name__ if loaded.spec.proposer else "no proposer"
        console.print(
            f"{loaded.base.config.model_type}, {proposer}. /help lists the commands, Ctrl-C stops "
            "an answer, Ctrl-D ends.",
            style="dim",
        )
    has_failed = loop.run()
    if has_failed and not is_terminal:
        raise typer.Exit(2)
