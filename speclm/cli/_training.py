"""What the commands of ``speclm train`` share: options, loading and the closing table."""

from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel, TrainingArguments

from speclm.cli._files import require_folder_to_write
from speclm.cli._models import load
from speclm.cli._options import ModelOptions
from speclm.config import require_count, require_positive
from speclm.errors import OptionError, SpeclmError

if TYPE_CHECKING:
    from speclm.training.heads_trainer import HeadsTrainer
    from speclm.training.rows import TrainingRows

MAX_LENGTH = 2048
_EVALUATION = "eval_"


@dataclass(frozen=True, slots=True)
class TrainOptions:
    """Options of every training."""

    data: Annotated[Path, typer.Option(help='JSON lines with "messages".')]
    out: Annotated[Path, typer.Option(help="Folder for heads and checkpoints.")]
    base: Annotated[
        str | None, typer.Option(help="Folder or hub id; by default the bundled model.")
    ] = None
    eval_data: Annotated[
        Path | None, typer.Option(help="JSON lines to evaluate on after each epoch.")
    ] = None
    epochs: Annotated[float, typer.Option()] = 2.0
    learning_rate: Annotated[float, typer.Option()] = 1e-3
    batch_size: Annotated[int, typer.Option(min=1, help="Rows of a step, per device.")] = 8
    max_length: Annotated[
        int | None,
        typer.Option(
            min=3, help=f"Tokens kept of a row; by default the base's, at most {MAX_LENGTH}."
        ),
    ] = None
    limit: Annotated[int | None, typer.Option(min=1, help="Rows, drawn at random.")] = None
    seed: Annotated[int, typer.Option()] = 0
    dtype: Annotated[str | None, typer.Option(help="Of the base: float32, bfloat16, ...")] = None
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint in --out.")
    ] = False
    report_to: Annotated[str, typer.Option(help="tensorboard, wandb, ... or none.")] = "none"
    training_arg: Annotated[
        list[str] | None,
        typer.Option(help="Any field of TrainingArguments, as key=value; may be repeated."),
    ] = None


@dataclass(frozen=True, slots=True)
class Prepared:
    """What is trained with."""

    base: PreTrainedModel
    arguments: TrainingArguments
    rows: "TrainingRows"
    eval_rows: "TrainingRows | None"


def with_train_options(
    **defaults: object,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Have a command take every field of `TrainOptions`, and give it them as first argument.

    Args:
        **defaults: Of fields that have another default in this command.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = list(signature(command).parameters.values())[1:]
        shared = [
            Parameter(
                field.name,
                Parameter.KEYWORD_ONLY,
                annotation=field.type,
                default=defaults.get(
                    field.name, Parameter.empty if field.default is MISSING else field.default
                ),
            )
            for field in fields(TrainOptions)
        ]

        @wraps(command)
        def run(**values: Any) -> None:
            given = {parameter.name: values.pop(parameter.name) for parameter in shared}
            command(TrainOptions(**given), **values)

        keyword_only = [parameter.replace(kind=Parameter.KEYWORD_ONLY) for parameter in own]
        parameters = [*shared[:4], *keyword_only, *shared[4:]]
        changed: Any = run  # its signature is what the command line is made from
        changed.__signature__ = Signature(parameters)
        return run

    return decorate


def prepare(
    options: TrainOptions, *, require_place: Callable[[Path], None], defaults: Mapping[str, Any]
) -> Prepared:
    """Check the options, then load base and rows.

    Args:
        options: As given.
        require_place: Checks that heads can be written into a folder.
        defaults: Of training arguments that are not given.

    Raises:
        OptionError: If an option is out of range, or the folder is that of another training.
    """
    from speclm.training.arguments import parse_settings, training_arguments
    from speclm.training.rows import load_rows

    out = options.out
    require_place(out)
    if not options.resume and any(out.glob("checkpoint-*")):
        raise OptionError(
            f"--out {str(out)!r} holds checkpoints of another training; pass --resume to go on, "
            "or another folder"
        )
    require_positive("--epochs", options.epochs)
    require_positive("--learning-rate", options.learning_rate)
    require_count("--seed", options.seed, low=0, high=2**31 - 1)
    require_folder_to_write("--out", out)
    settings = {
        "num_train_epochs": options.epochs,
        "learning_rate": options.learning_rate,
        "per_device_train_batch_size": options.batch_size,
        "per_device_eval_batch_size": options.batch_size,
        "eval_strategy": "epoch" if options.eval_data else "no",
        "seed": options.seed,
        "report_to": options.report_to.split(","),
        **parse_settings(options.training_arg or []),
    }
    arguments = training_arguments(out, settings, defaults=defaults)
    loaded = load(ModelOptions(base=options.base, dtype=options.dtype))
    known: int | None = getattr(loaded.base.config, "max_position_embeddings", None)
    length = options.max_length or min(known or MAX_LENGTH, MAX_LENGTH)
    rows = load_rows(
        options.data, loaded.tokenizer, limit=options.limit, seed=options.seed, max_length=length
    )
    eval_rows = None
    if options.eval_data is not None:
        eval_rows = load_rows(options.eval_data, loaded.tokenizer, max_length=length)
    return Prepared(loaded.base, arguments, rows, eval_rows)


def run_training(make: Callable[[], "HeadsTrainer"], options: TrainOptions) -> None:
    """Train, write the heads and print how well they guess.

    Args:
        make: Makes the trainer.
        options: As given.

    Raises:
        OptionError: If `Trainer` cannot begin with what --training-arg and --report-to say.
    """
    trainer: HeadsTrainer | None = None
    try:
        trainer = make()
        trainer.train(resume_from_checkpoint=options.resume)
    except (SpeclmError, MemoryError):
        raise
    except Exception as error:
        has_begun = trainer is not None and trainer.state.global_step > 0
        if has_begun or (not options.training_arg and options.report_to == "none"):
            raise
        # Most fields are read first, and some only, by what they are for.
        raise OptionError(
            f"training cannot begin with --training-arg {options.training_arg or []!r} and "
            f"--report-to {options.report_to!r} ({type(error).__name__}: {error}); correct or drop "
            "the one that this is about"
        ) from error
    trainer.save_model()
    if trainer.is_world_process_zero():
        _print_result(trainer.state.log_history, options.out)


def _print_result(logs: list[dict[str, Any]], out: Path) -> None:
    """Print the last evaluation, or the last figures of training where there was none."""
    evaluated = [log for log in logs if f"{_EVALUATION}estimated_tau" in log]
    found = evaluated or [log for log in logs if "estimated_tau" in log]
    console = Console(soft_wrap=True)
    if found:
        prefix = _EVALUATION if evaluated else ""
        last = {name.removeprefix(prefix): value for name, value in found[-1].items()}
        guesses = [name.removesuffix("_top1") for name in last if name.endswith("_top1")]
        table = Table("guess", "loss", "top-1", "top-2", "top-3", title=f"step {last['step']}")
        for guess in guesses:
            loss = f"{last[f'{guess}_loss']:.3f}" if f"{guess}_loss" in last else "-"
            table.add_row(guess, loss, *(f"{last[f'{guess}_top{top}']:.1%}" for top in (1, 2, 3)))
        console.print(table)
        rows = "the evaluation rows" if evaluated else "the last rows"
        console.print(f"estimated tau on {rows}: {last['estimated_tau']:.2f}")
    console.print(f"heads are in {out}", markup=False)
