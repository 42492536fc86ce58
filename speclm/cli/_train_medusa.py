"""``speclm train medusa``: trains Medusa heads."""

from functools import partial
from typing import Annotated

import typer

from speclm.cli._training import TrainOptions, prepare, run_training, with_train_options
from speclm.config import require_count
from speclm.methods.medusa.checkpoint import require_writable

_MAX_LAYERS = 64


@with_train_options()
def medusa(
    options: TrainOptions,
    *,
    num_heads: Annotated[int, typer.Option(help="Heads: tokens that are guessed ahead.")] = 5,
    num_layers: Annotated[int, typer.Option(help="Residual layers of each head.")] = 1,
    own_lm_head: Annotated[
        bool, typer.Option("--own-lm-head", help="Give each head an output matrix of its own.")
    ] = False,
    decay: Annotated[float, typer.Option(help="Weight of a head relative to the last.")] = 0.8,
    soft_weight: Annotated[
        float, typer.Option(help="Share of the loss against the base's own distribution.")
    ] = 0.0,
) -> None:
    """Train Medusa heads; the base stays as it is."""
    from speclm.methods.medusa.network import MAX_HEADS
    from speclm.methods.medusa.training import MedusaObjective, MedusaTrainer, new_medusa_heads
    from speclm.training.arguments import DEFAULTS

    require_count("--num-heads", num_heads, low=1, high=MAX_HEADS)
    require_count("--num-layers", num_layers, low=1, high=_MAX_LAYERS)
    objective = MedusaObjective(decay=decay, soft_weight=soft_weight)
    prepared = prepare(options, require_place=require_writable, defaults=DEFAULTS)
    heads = new_medusa_heads(
        prepared.base,
        num_heads=num_heads,
        num_layers=num_layers,
        has_own_lm_head=own_lm_head,
        seed=options.seed,
    )
    make = partial(
        MedusaTrainer,
        prepared.base,
        heads,
        prepared.arguments,
        train_dataset=prepared.rows,
        eval_dataset=prepared.eval_rows,
        objective=objective,
    )
    run_training(make, options)
