"""The published text-to-SQL case: train heads on a base's answers, then time held-out prompts.

    python examples/text_to_sql.py                             # bundled model, shortened training
    python examples/text_to_sql.py --full --rows wikisql.jsonl # 3,000 rows

Each step leaves its result in --out, and the same command goes on where an interrupted one ended.
"""

import argparse
import hashlib
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import typer
from sql_report import Measured, measure, table, write_report
from transformers import AutoTokenizer, Trainer

from speclm import SpecModel, __version__
from speclm.bench import make_calls, setting_options, speculative_decoder
from speclm.bench.records import describe_commit, describe_machine, describe_versions
from speclm.cli import app
from speclm.config import require_count, require_positive
from speclm.demo.bundle import assets
from speclm.errors import DataError, OptionError, SpeclmError
from speclm.files.atomic import read_json, write_file, write_json, written_together
from speclm.files.json_lines import parse_json_lines
from speclm.plots import require_plots
from speclm.target.loading import eos_token_ids
from speclm.training.adapter import Adapter
from speclm.training.arguments import training_arguments
from speclm.training.dataset import collate_examples, load_examples
from speclm.training.history import HISTORY_NAME

INTERRUPTED = 130
RECIPES = ("medusa", "eagle", "eagle3", "block", "draft")
BUNDLED = ("draft", "medusa", "eagle", "eagle3", "block")

SMALL_BASE: Mapping[str, tuple[str, ...]] = {
    "medusa": ("--learning-rate", "0.003"),
    "eagle3": ("--learning-rate", "0.004", "--num-steps", "5", "--draft-vocab-size", "2048"),
    "eagle": ("--learning-rate", "0.003"),
}
"""Options of trainings for the bundled base; a larger one learns with the defaults."""

EPOCHS: Mapping[str, float] = {"medusa": 4, "eagle": 4, "eagle3": 2, "block": 4, "draft": 4}
"""Passes over the answers if `--epochs` is not given."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """How much is trained and measured if the options do not say."""

    num_rows: int
    train: tuple[str, ...]
    bundled: tuple[str, ...]


SHORT = Size(num_rows=200, train=("medusa",), bundled=("draft",))
FULL = Size(num_rows=3000, train=("medusa", "eagle3"), bundled=("draft", "medusa", "eagle3"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What is trained and measured; a run is continued only with the same case.

    Args:
        base: Folder or hub id; None for the bundled model.
        dtype: Of the base's weights.
        rows: Conversations to train on.
        held_out: Conversations to measure on.
        num_rows: Rows that the base answers.
        num_prompts: Prompts that are measured.
        max_new_tokens: Maximum length of an answer.
        train: Recipes of ``speclm train``.
        bundled: Bundled heads that are measured too.
        epochs: Passes over the answers; None for `EPOCHS`.
        fine_tune: Whether the base is tuned on the rows first.
        threads: Of PyTorch.
    """

    base: str | None
    dtype: str
    rows: Path
    held_out: Path
    num_rows: int
    num_prompts: int
    max_new_tokens: int
    train: tuple[str, ...]
    bundled: tuple[str, ...]
    epochs: float | None
    fine_tune: bool
    threads: int

    def settings(self) -> dict[str, Any]:
        """Return what a run depends on, files by their content."""
        files = {"rows": self.rows, "held_out": self.held_out}
        others = {name: getattr(self, name) for name in self.__slots__ if name not in files}
        digests = {name: digest(path) for name, path in files.items()}
        return dict(json.loads(json.dumps({**others, **digests, "version": __version__})))


def digest(path: Path) -> str:
    """Return the SHA-256 of a file.

    Raises:
        DataError: If it cannot be read.
    """
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error}); name a file of JSON lines") from error


def run(*words: object) -> None:
    """Print a command of speclm and run it; end as it does, if that is not with 0."""
    arguments = [str(word) for word in words]
    print(f"\n$ speclm {shlex.join(arguments)}", flush=True)
    status = app(arguments, prog_name="speclm", standalone_mode=False)
    if status == INTERRUPTED:
        raise KeyboardInterrupt
    if status:
        sys.exit(status)


def begin(case: Case, out: Path) -> None:
    """Make the folder, or check that it holds an earlier run of the same case.

    Raises:
        OptionError: If it holds something else.
    """
    path, settings = out / "settings.json", case.settings()
    if path.exists():
        try:
            found = dict(read_json(path))
        except (OSError, ValueError, TypeError) as error:
            raise OptionError(f"{path} cannot be read ({error}); name another --out") from error
        if found.keys() != settings.keys():
            raise OptionError(f"{path} is not of this example and version; name another --out")
        name = next((name for name in settings if found[name] != settings[name]), None)
        if name is not None and (out / "train.jsonl").exists():
            raise OptionError(
                f"--out {str(out)!r} holds a run with {name}={found[name]!r}, expected "
                f"{settings[name]!r}; name another folder, or delete it"
            )
    elif out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise OptionError(
            f"--out {str(out)!r} holds other files, expected a new folder; name another"
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_json(path, settings)
    except OSError as error:
        raise OptionError(f"--out {str(out)!r} cannot be written ({error})") from error


def prepare(case: Case, out: Path) -> None:
    """Convert both files, and write what is to be answered, ``train.jsonl``.

    Raises:
        DataError: If a file has too few rows.
    """
    if (out / "train.jsonl").exists():
        return
    for source, name in ((case.rows, "rows"), (case.held_out, "held_out")):
        run("data", "convert", source, "--out", out / f"{name}.jsonl", "--overwrite")
    held_out = parse_json_lines(out / "held_out.jsonl")
    if len(held_out) < case.num_prompts:
        raise DataError(
            f"{case.held_out} has {len(held_out)} rows, expected {case.num_prompts}; pass more, or "
            f"--num-prompts {len(held_out)}"
        )
    prompts = [row["messages"][:-1] for row in held_out]
    rows = parse_json_lines(out / "rows.jsonl")
    kept = [row for row in rows if row["messages"][:-1] not in prompts]
    if len(kept) < len(rows):
        print(f"{len(rows) - len(kept)} rows are left out, because their prompts are held out")
    if len(kept) < case.num_rows:
        raise DataError(
            f"{case.rows} has {len(kept)} rows to train on, expected {case.num_rows}; pass more "
            f"with --rows, or --num-rows {len(kept)}"
        )
    write_rows(out / "train.jsonl", kept[: case.num_rows])


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as JSON lines."""
    write_file(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def base_folder(case: Case, out: Path) -> str | None:
    """Return the base that answers: the tuned one, or what ``--base`` names."""
    return str(out / "base") if case.fine_tune else case.base


def base_options(case: Case, out: Path) -> list[object]:
    """Return the options of a command that loads the base."""
    base = base_folder(case, out)
    options = ["--dtype", case.dtype, "--threads", case.threads]
    return options if base is None else [*options, "--base", base]


def load(case: Case, base: str | None) -> tuple[Any, Any]:
    """Return a model, on a GPU if there is one, and its tokenizer."""
    torch.set_num_threads(case.threads)
    name = base or str(assets()["base"])
    model: Any = SpecModel.from_pretrained(name, None, dtype=case.dtype).base
    placed = model.cuda() if torch.cuda.is_available() else model
    return placed, AutoTokenizer.from_pretrained(name)


def fine_tune(case: Case, out: Path) -> None:
    """Tune the base on the rows' own answers with LoRA, and write the merged model."""
    if not case.fine_tune or (out / "base" / "config.json").exists():
        return
    print("\nfine-tuning the base with LoRA")
    base, tokenizer = load(case, case.base)
    stops = eos_token_ids(base)
    examples = load_examples(out / "train.jsonl", tokenizer, max_length=2048, eos_token_ids=stops)
    adapter = Adapter(base, rank=16)
    settings = {
        "num_train_epochs": 1,
        "learning_rate": 2e-4,
        "remove_unused_columns": False,
        "save_strategy": "no",
        "train_sampling_strategy": "random",
    }
    arguments = training_arguments(out / "fine-tuning", settings)
    Trainer(base, arguments, train_dataset=examples, data_collator=labelled).train()
    with written_together(out / "base", last="config.json") as aside:
        adapter.merged().save_pretrained(aside)
        tokenizer.save_pretrained(aside, save_jinja_files=False)


def labelled(examples: Sequence[Any]) -> dict[str, torch.Tensor]:
    """Pad examples; only the tokens that the assistant wrote count in the loss."""
    batch = collate_examples(examples)
    counts = batch.pop("loss_mask")
    return {**batch, "labels": batch["input_ids"].masked_fill(~counts, -100)}


def train(case: Case, out: Path) -> None:
    """Let the base answer the prompts, and train heads on its answers."""
    base, answers = base_options(case, out), out / "answers.jsonl"
    if not answers.exists():
        longest = ("--max-new-tokens", case.max_new_tokens)
        run("data", "distill", "--data", out / "train.jsonl", "--out", answers, *longest, *base)
    rows = parse_json_lines(answers)
    num_eval = max(1, len(rows) // 20)
    write_rows(out / "heads_train.jsonl", rows[num_eval:])
    write_rows(out / "heads_eval.jsonl", rows[:num_eval])
    data = ("--data", out / "heads_train.jsonl", "--eval-data", out / "heads_eval.jsonl")
    for recipe in case.train:
        heads = out / recipe
        if (heads / HISTORY_NAME).exists():
            continue
        (out / "calls.jsonl").unlink(missing_ok=True)  # measured with other heads
        own = SMALL_BASE.get(recipe, ()) if case.base is None else ()
        resumed = ["--resume"] if any(heads.glob("checkpoint-*")) else []
        epochs = ("--epochs", epochs_of(recipe, case))
        run("train", recipe, *data, "--out", heads, *epochs, *own, *base, *resumed)


def epochs_of(recipe: str, case: Case) -> float:
    """Return the passes of a training over the answers."""
    return EPOCHS[recipe] if case.epochs is None else case.epochs


def measured_calls(case: Case, out: Path) -> list[Measured]:
    """Time the held-out prompts with the base and with all heads, or read what was timed."""
    base, tokenizer = load(case, base_folder(case, out))
    rows = parse_json_lines(out / "held_out.jsonl")[: case.num_prompts]
    options = {**setting_options("greedy"), "max_new_tokens": case.max_new_tokens}
    calls = make_calls([row["messages"][:-1] for row in rows], base, tokenizer, options=options)
    heads = {f"{name}, trained here": out / name for name in case.train}
    heads |= {f"{name}, bundled": assets()[name] for name in case.bundled}
    methods = [
        speculative_decoder(name, base, SpecModel.from_pretrained(base, folder).proposer)
        for name, folder in heads.items()
    ]
    return measure(base, calls, methods, path=out / "calls.jsonl")


def report(case: Case, out: Path, measured: Sequence[Measured]) -> None:
    """Print the table, and write it with both charts into the folder ``report``."""
    machine, commit = describe_machine(), describe_commit()
    epochs = ", ".join(f"{name}: {epochs_of(name, case):g} epochs" for name in case.train)
    facts = {
        "base": (case.base or "the bundled model") + (", fine-tuned" if case.fine_tune else ""),
        "trained on": f"answers to {case.num_rows} rows ({epochs})",
        "measured on": f"{len(measured[0].seconds)} held-out prompts, one at a time, greedy",
        "dtype": case.dtype,
        "machine": ", ".join([machine.cpu, f"{machine.num_cores} cores", *machine.gpus]),
        "threads": str(machine.num_threads),
        "versions": ", ".join(map(" ".join, describe_versions().items())),
        "commit": f"{commit.sha}{', with changes' if commit.is_dirty else ''}",
    }
    write_report(out / "report", facts, measured)
    print(f"\n{table(measured)}\n\nreport is in {out / 'report'}")


def parse(arguments: Sequence[str] | None) -> tuple[Case, Path]:
    """Return what the options ask for.

    Raises:
        OptionError: If a value cannot be used, or a package is not installed.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--out", type=Path, default=Path("text-to-sql"), help="folder of all results")
    add("--full", action="store_true", help="3,000 rows of --rows, and all heads")
    add("--rows", type=Path, help="chats to train on, in a form of `speclm data convert`")
    add("--held-out", type=Path, help="chats to measure on, in such a form; bundled ones")
    add("--num-rows", type=int, help="rows to train on")
    add("--num-prompts", type=int, default=450, help="prompts to measure")
    add("--base", help="folder or hub id; by default the bundled model")
    add("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    add("--fine-tune", action="store_true", help="tune the base on the rows first, with LoRA")
    add("--train", help=f"heads to train: some of {','.join(RECIPES)}")
    add("--bundled", help=f"bundled heads to measure: some of {','.join(BUNDLED)}, or none")
    add("--epochs", type=float, help="passes over the answers; 4, or 2 of EAGLE-3")
    add("--max-new-tokens", type=int, default=128, help="maximum length of an answer")
    add("--threads", type=int, default=1, help="threads of PyTorch; one suits a small model")
    options = parser.parse_args(arguments)
    size, prompts = FULL if options.full else SHORT, assets()["prompts"]
    bundled = size.bundled if options.base is None else ()
    given = {
        name: getattr(options, name)
        for name in ("base", "dtype", "num_prompts", "max_new_tokens", "fine_tune", "threads")
    }
    case = Case(
        **given,
        rows=options.rows or prompts / "sql_train.jsonl",
        held_out=options.held_out or prompts / "sql_case.jsonl",
        num_rows=size.num_rows if options.num_rows is None else options.num_rows,
        train=names("--train", options.train, RECIPES, default=size.train),
        bundled=names("--bundled", options.bundled, BUNDLED, default=bundled),
        epochs=options.epochs,
    )
    for name, low in {"num_rows": 2, "num_prompts": 2, "max_new_tokens": 1, "threads": 1}.items():
        require_count(f"--{name.replace('_', '-')}", getattr(case, name), low=low, high=2**31 - 1)
    if case.epochs is not None:
        require_positive("--epochs", case.epochs)
    if not case.train and not case.bundled:
        raise OptionError("--train and --bundled name no heads, expected some to measure; name one")
    if case.base is not None and case.bundled:
        raise OptionError(
            f"--bundled is {options.bundled!r} with --base, but needs the bundled one; drop one"
        )
    require_plots("this example")
    if case.fine_tune and find_spec("peft") is None:
        raise OptionError(
            "--fine-tune needs peft, which is not installed; run: pip install 'speclm[train]'"
        )
    return case, options.out


def names(
    option: str, given: str | None, known: Sequence[str], *, default: tuple[str, ...]
) -> tuple[str, ...]:
    """Return the names that an option lists, separated by commas.

    Raises:
        OptionError: If one is unknown.
    """
    if given is None:
        return default
    found = tuple(dict.fromkeys(given.split(","))) if given != "none" else ()
    for name in found:
        if name not in known:
            raise OptionError(f"{option} has {name!r}, expected some of {[*known]!r}; correct it")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the case; return the exit status."""
    try:
        case, out = parse(arguments)
        begin(case, out)
        prepare(case, out)
        fine_tune(case, out)
        train(case, out)
        report(case, out, measured_calls(case, out))
    except SpeclmError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, typer.Abort):
        print("interrupted; the same command goes on where this one ended", file=sys.stderr)
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
