"""``speclm push``: uploads heads to the hub."""

from rich.console import Console
from rich.table import Table

from speclm.cli._console import printable
from speclm.cli._heads_options import PushOptions
from speclm.files.hub import UploadOptions
from speclm.model.publishing import Publication, prepare_publication, publish


def push(options: PushOptions) -> None:
    """Check heads or a draft model, and upload them with a card; or print what would be."""
    found = prepare_publication(
        options.folder, options.repository, base=options.base, report=options.report
    )
    console = Console(soft_wrap=True)
    console.print(_listing(found))
    if found.is_own_card:
        console.print("the card is your own: it is uploaded as it is")
    if options.dry_run:
        console.print(f"\n{printable(found.card)}", markup=False, highlight=False)
        return
    address = publish(
        found,
        UploadOptions(
            message=options.commit_message,
            private=options.private or None,
            revision=options.revision,
            create_pr=options.create_pr,
        ),
    )
    console.print(f"uploaded to {address}", markup=False)


def _listing(publication: Publication) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold underline")
    table.add_column("file")
    table.add_column("bytes", justify="right")
    for name, size in publication.sizes.items():
        table.add_row(printable(name), f"{size:,}")
    return table
