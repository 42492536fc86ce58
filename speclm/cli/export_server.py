"""``speclm export-server``: writes a folder that the server of Transformers serves with drafts."""

from typing import Any

from rich.console import Console
from transformers.utils.logging import disable_progress_bar

from speclm.cli._console import printable
from speclm.cli._heads_options import ExportServerOptions
from speclm.cli._options import BUNDLED_HEADS
from speclm.demo.bundle import assets
from speclm.serving.folder import export_server as export


def export_server(options: ExportServerOptions) -> None:
    """Write the folder, and print how to serve it."""
    given: dict[str, Any] = {
        "revision": options.heads_revision,
        "subfolder": options.heads_subfolder,
        "corpus": options.corpus,
        "token_map": options.token_map,
    }
    bundled = assets()
    is_bundled = options.base is None
    heads: Any = options.heads or ("draft" if is_bundled else "lookup")
    disable_progress_bar()  # type: ignore[no-untyped-call]  # Transformers' own
    done = export(
        bundled["base"] if options.base is None else options.base,
        options.out,
        heads=bundled[heads] if is_bundled and heads in BUNDLED_HEADS else heads,
        revision=options.revision,
        heads_kwargs={name: value for name, value in given.items() if value is not None},
        num_draft_tokens=options.num_draft_tokens,
        tree=options.tree,
        engine=options.engine,
        check=options.check,
    )
    console = Console(soft_wrap=True)

    def write(text: str) -> None:
        console.print(printable(text), markup=False, highlight=False)

    write(f"written to {done.folder}: {done.num_bytes:,} bytes, drafts by {done.method}")
    if done.verification is not None:
        write(f"verification: {done.verification}")
    for note in done.notes:
        write(f"note: {note}")
    write(f"\nserve it on http://localhost:8000/v1 with\n{done.command}")
