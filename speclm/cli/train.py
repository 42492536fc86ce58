"""``speclm train``: trains heads for a base."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from speclm.cli._models import load
from speclm.config import require_count, require_positive
from speclm.errors import OptionError
from speclm.formats import require_place_for_heads

if TYPE_CHECKING:
    from speclm.training import MedusaTrainer

MAX_LENGTH = 2048
_MAX_LAYERS = 64

train = typer.Typer(help="Train heads for a base.", no_args_is_help=True)


@train.callback()
def _group() -> None:
    """Keep the name of the only command."""


@train.command()
def medusa(  # noqa: PLR0913, PLR0917 - each is an option of the command
    data: Annotated[Path, typer.Option(help='JSON lines with "messages".')],
    out: Annotated[Path, typer.Option(help="Folder for heads and checkpoints.")],
    base: Annotated[
        str | None, typer.Option(help="Folder or hub id; by default the bundled model.")
    ] = None,
    eval_data: Annotated[
        Path | None, typer.Option(help="JSON lines to evaluate on after each epoch.")
    ] = None,
    num_heads: Annotated[int, typer.Option(help="Heads: tokens that are guessed ahead.")] = 5,
    num_layers: Annotated[int, typer.Option(help="Residual layers of each head.")] = 1,
    own_lm_head: Annotated[
        bool, typer.Option("--own-lm-head", help="Give each head an output matrix of its own.")
    ] = False,
    epochs: Annotated[float, typer.Option()] = 2.0,
    learning_rate: Annotated[float, typer.Option()] = 1e-3,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows of a step, per device.")] = 8,
    max_length: Annotated[
        int | None,
        typer.Option(
            min=3, help=f"Tokens kept of a row; by default the base's, at most {MAX_LENGTH}."
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Rows, drawn at random.")] = None,
    seed: Annotated[int, typer.Option()] = 0,
    decay: Annotated[float, typer.Option(help="Weight of a head relative to the last.")] = 0.8,
    soft_weight: Annotated[
        float, typer.Option(help="Share of the loss against the base's own law.")
    ] = 0.0,
    dtype: Annotated[str | None, typer.Option(help="Of the base: float32, bfloat16, ...")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint in --out.")
    ] = False,
    report_to: Annotated[str, typer.Option(help="tensorboard, wandb, ... or none.")] = "none",
    training_arg: Annotated[
        list[str] | None,
        typer.Option(help="Any field of TrainingArguments, as key=value; may be repeated."),
    ] = None,
) -> None:
    """Train Medusa heads; the base stays as it is."""
    from speclm.heads.medusa import MAX_HEADS
    from speclm.training import (
        MedusaObjective,
        MedusaTrainer,
        load_rows,
        new_medusa_heads,
        parse_settings,
        training_arguments,
    )

    require_place_for_heads(out)
    if not resume and any(out.glob("checkpoint-*")):
        raise OptionError(
            f"--out {str(out)!r} holds checkpoints of another training; pass --resume to go on, "
            "or another folder"
        )
    require_positive("--epochs", epochs)
    require_positive("--learning-rate", learning_rate)
    require_count("--num-heads", num_heads, low=1, high=MAX_HEADS)
    require_count("--num-layers", num_layers, low=1, high=_MAX_LAYERS)
    require_count("--seed", seed, low=0, high=2**31 - 1)
    settings = {
        "num_train_epochs": epochs,
        "learning_rate": learning_rate,
        "per_device_train_batch_size": batch_size,
        "per_device_eval_batch_size": batch_size,
        "eval_strategy": "epoch" if eval_data else "no",
        "seed": seed,
        "report_to": report_to.split(","),
        **parse_settings(training_arg or []),
    }
    arguments = training_arguments(out, settings)
    objective = MedusaObjective(decay=decay, soft_weight=soft_weight)
    loaded = load(base, "none", dtype=dtype)
    known: int | None = getattr(loaded.base.config, "max_position_embeddings", None)
    length = max_length or min(known or MAX_LENGTH, MAX_LENGTH)

    rows = load_rows(data, loaded.tokenizer, limit=limit, seed=seed, max_length=length)
    eval_rows = load_rows(eval_data, loaded.tokenizer, max_length=length) if eval_data else None
    heads = new_medusa_heads(
        loaded.base,
        num_heads=num_heads,
        num_layers=num_layers,
        has_own_lm_head=own_lm_head,
        seed=seed,
    )
    trainer = MedusaTrainer(
        loaded.base,
        heads,
        arguments,
        train_dataset=rows,
        eval_dataset=eval_rows,
        objective=objective,
    )
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    if trainer.is_world_process_zero():
        _print_result(trainer, num_heads, out)


def _print_result(trainer: "MedusaTrainer", num_heads: int, out: Path) -> None:
    logs = trainer.state.log_history
    last: dict[str, Any] = next((log for log in reversed(logs) if "estimated_tau" in log), {})
    table = Table("head", "loss", "top-1", "top-2", "top-3", title=f"step {last.get('step')}")
    for head in range(num_heads):
        if f"head{head}_loss" in last:
            shares = (f"{last[f'head{head}_top{top}']:.1%}" for top in (1, 2, 3))
            table.add_row(str(head), f"{last[f'head{head}_loss']:.3f}", *shares)
    console = Console(soft_wrap=True)
    if last:
        console.print(table)
        console.print(f"estimated tau on the last rows: {last['estimated_tau']:.2f}")
    console.print(f"heads are in {out}", markup=False)
