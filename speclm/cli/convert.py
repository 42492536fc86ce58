"""``speclm convert``: writes heads in the checkpoint format of other software."""

from rich.console import Console

from speclm.cli._console import printable
from speclm.cli._heads_options import ConvertOptions
from speclm.model.exporting import convert_heads


def convert(options: ConvertOptions) -> None:
    """Convert heads, and print what loads them and how."""
    given = {
        "revision": options.heads_revision,
        "subfolder": options.heads_subfolder,
        "cache_dir": options.cache_dir,
        "token_map": options.token_map,
    }
    done = convert_heads(
        options.heads,
        options.out,
        to=options.to,
        base=options.base,
        revision=options.revision,
        heads_kwargs={name: value for name, value in given.items() if value is not None},
    )
    console = Console(soft_wrap=True)

    def write(text: str) -> None:
        console.print(printable(text), markup=False, highlight=False)

    write(f"{done.method} heads, {done.source} -> {done.format}: {done.num_bytes:,} bytes")
    for note in done.notes:
        write(f"note: {note}")
    for engine in done.engines:
        write(f"\n{engine.name}, versions: {engine.versions}. {engine.note}".rstrip())
        if engine.command:
            base = options.base or "path/to/base"
            write(engine.command_for(base=base, heads=str(done.folder)))
    write(f"\nwritten to {done.folder}")
