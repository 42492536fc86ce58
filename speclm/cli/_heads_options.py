"""Options of the commands that read files of heads; see `speclm.cli._options`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from speclm.cli._options import (
    CacheDir,
    Corpus,
    Engine,
    HeadsRevision,
    HeadsSubfolder,
    NumDraftTokens,
    Revision,
    TokenMap,
    Tree,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertOptions:
    """Write heads in the checkpoint format of other software; needs no GPU."""

    heads: Annotated[str, typer.Argument(help="Folder or hub id of the heads, in any format.")]
    to: Annotated[
        str,
        typer.Option(
            help="Format to write: speclm, medusa, eagle, vllm, vllm-legacy, sglang, tgi, "
            "speculators, specforge, modelopt, rtp-llm, dflash, dspark or whole."
        ),
    ]
    out: Annotated[Path, typer.Option(help="New folder to write.")]
    base: Annotated[
        str | None,
        typer.Option(help="Folder or hub id of the base, for formats that embed its matrices."),
    ] = None
    revision: Revision = None
    heads_revision: HeadsRevision = None
    heads_subfolder: HeadsSubfolder = None
    cache_dir: CacheDir = None
    token_map: TokenMap = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PushOptions:
    """Upload heads or a trained draft model to the hub, with a card of their recipe and figures."""

    folder: Annotated[Path, typer.Argument(help="Folder of the heads, or of the draft model.")]
    repository: Annotated[
        str, typer.Argument(help="Hub id such as org/my-heads; made if it does not exist.")
    ]
    base: Annotated[
        str | None, typer.Option(help="Hub id of the base, for heads that do not record it.")
    ] = None
    report: Annotated[
        Path | None,
        typer.Option(help="Report of speclm bench; by default FOLDER/report, if there is one."),
    ] = None
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = (
        False
    )
    revision: Annotated[
        str | None, typer.Option(help="Branch to upload to; made if it does not exist.")
    ] = None
    create_pr: Annotated[
        bool, typer.Option("--create-pr", help="Open a pull request in place of a commit.")
    ] = False
    commit_message: Annotated[str, typer.Option(help="Summary of the commit.")] = (
        "Upload draft heads"
    )
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the files and the card, and upload nothing.")
    ] = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportServerOptions:
    """Write a folder that transformers serve --trust-remote-code serves with drafts.

    It answers requests of OpenAI's clients with the text of the base.
    """

    base: Annotated[
        str | None, typer.Argument(help="Folder or hub id; by default the bundled model.")
    ] = None
    out: Annotated[
        Path, typer.Option(help="Folder to write: a new one, or an earlier export to replace.")
    ]
    heads: Annotated[
        str | None,
        typer.Option(help="Method name, or folder or hub id of heads or of a draft model."),
    ] = None
    revision: Revision = None
    heads_revision: HeadsRevision = None
    heads_subfolder: HeadsSubfolder = None
    tree: Tree = None
    num_draft_tokens: NumDraftTokens = None
    engine: Engine = "auto"
    corpus: Corpus = None
    token_map: TokenMap = None
    check: Annotated[
        bool, typer.Option(help="Load base and heads once on the CPU, to check that they fit.")
    ] = True
