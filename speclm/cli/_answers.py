"""The answers of ``speclm train --distill``: the base's own, in the folder of the training."""

import hashlib
from pathlib import Path

from rich.console import Console

from speclm.cli._models import Loaded
from speclm.cli.distill import answering_bar
from speclm.cli.train import TrainOptions
from speclm.data.dialogues import DistillSettings
from speclm.data.distillation import ModelSource, distill
from speclm.errors import CheckpointError
from speclm.files.atomic import write_file
from speclm.model import SpecModel
from speclm.training.conversations import draw_lines


def answer_data(
    options: TrainOptions, loaded: Loaded, *, is_main: bool
) -> tuple[Path, Path | None]:
    """Let the base answer the conversations of the data and the evaluation data anew, greedily.

    Answers that an interrupted run has finished are kept, and a resumed training keeps all.

    Args:
        options: Of the training.
        loaded: The base.
        is_main: Whether this process generates; the others use what it has written.

    Returns:
        Files in ``--out``.

    Raises:
        DataError: If the data cannot be used, or no answer can be kept.
        CheckpointError: If a training is resumed whose answers are those to other data.
    """
    out = options.out
    data, eval_data = out / "distilled.jsonl", out / "distilled_eval.jsonl"
    if is_main:
        out.mkdir(parents=True, exist_ok=True)
        _begin(out / "distilled.sha256", options, (data, eval_data))
        source = options.data
        if options.limit is not None:
            lines = draw_lines(source, limit=options.limit, seed=options.seed)
            source = out / "drawn.jsonl"
            write_file(source, b"".join(line.content + b"\n" for line in lines))
        _answer(source, data, options, loaded)
        if options.eval_data is not None:
            _answer(options.eval_data, eval_data, options, loaded)
    return data, None if options.eval_data is None else eval_data


def digest(options: TrainOptions) -> str:
    """Return a hash of what decides the answers, which a resumed training must share."""
    settings = f"{options.base} {options.distill_tokens} {options.limit} {options.seed}"
    parts = [hashlib.sha256(settings.encode())]
    for path in filter(None, (options.data, options.eval_data)):
        with path.open("rb") as file:
            parts.append(hashlib.file_digest(file, "sha256"))
    return hashlib.sha256(b"".join(part.digest() for part in parts)).hexdigest()[:16]


def _begin(record: Path, options: TrainOptions, files: tuple[Path, ...]) -> None:
    """Record what the answers are made from; check that it is the same if they are resumed."""
    wanted = digest(options)
    if options.resume and record.is_file():
        if record.read_text("utf-8", errors="replace") != wanted:
            raise CheckpointError(
                f"{record}: the data or an option (--base, --limit, --seed, --distill-tokens) "
                "differs from what was answered, expected the same; resume with that, or train in "
                "another folder"
            )
    elif not options.resume:
        for path in files:  # of an earlier training
            path.unlink(missing_ok=True)
    write_file(record, wanted)


def _answer(source: Path, out: Path, options: TrainOptions, loaded: Loaded) -> None:
    if options.resume and out.is_file():
        return
    console = Console(stderr=True)
    with answering_bar(console) as show:
        report = distill(
            source,
            out,
            ModelSource(SpecModel.from_pretrained(loaded.base), loaded.tokenizer),
            settings=DistillSettings(max_new_tokens=options.distill_tokens),
            overwrite=True,
            on_progress=show,
        )
    totals = report.totals
    reasons = ", ".join(f"{count} {reason}" for reason, count in totals.dropped.most_common())
    console.print(
        f"the base answered {totals.num_rows} rows of {source.name} anew"
        + (f", {totals.dropped.total()} dropped ({reasons})" if reasons else ""),
        highlight=False,
    )
