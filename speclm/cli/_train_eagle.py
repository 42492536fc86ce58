"""``speclm train eagle`` and ``speclm train eagle3``: train EAGLE heads."""

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from speclm.cli._training import Prepared, TrainOptions, prepare, run_training, with_train_options
from speclm.config import require_count, require_size
from speclm.errors import OptionError
from speclm.methods.eagle.checkpoint import require_writable

if TYPE_CHECKING:
    from speclm.methods.eagle.network import EagleHeads
    from speclm.methods.eagle.objective import EagleObjective

LEARNING_RATE = 1e-4
MAX_DRAFT_VOCAB_SIZE = 32_000
"""Most tokens that new heads guess among when no number is given; as those of the authors."""

_MAX_LAYERS = 64

NumLayers = Annotated[int | None, typer.Option(help="Decoder layers of new heads; 1 by default.")]
Init = Annotated[
    str | None, typer.Option(help="Folder or hub id of heads to go on from; they stay as they are.")
]
InitRevision = Annotated[
    str | None, typer.Option(help="Branch, tag or commit of --init on the hub.")
]
Decay = Annotated[float, typer.Option(help="Weight of a step relative to the one before it.")]
NumSteps = Annotated[int, typer.Option(help="Guesses in a row that are trained.")]


@dataclass(frozen=True, slots=True)
class _Start:
    """What the heads are before they are trained."""

    kind: str
    init: str | None
    num_layers: int | None
    draft_vocab_size: int | None = None
    init_revision: str | None = None

    def __post_init__(self) -> None:
        if self.num_layers is not None:
            require_count("--num-layers", self.num_layers, low=1, high=_MAX_LAYERS)
        if self.draft_vocab_size is not None:
            require_size("--draft-vocab-size", self.draft_vocab_size)
        if self.init is None and self.init_revision is not None:
            raise OptionError(
                f"--init-revision is {self.init_revision!r} without --init, expected heads on the "
                "hub to go on from; name them, or leave it out"
            )
        for name, value in (
            ("--num-layers", self.num_layers),
            ("--draft-vocab-size", self.draft_vocab_size),
        ):
            if self.init is not None and value is not None:
                raise OptionError(
                    f"{name} is {value} next to --init {self.init!r}, whose heads keep their "
                    "numbers and their vocabulary; leave one of them out"
                )

    def heads(self, prepared: Prepared, *, seed: int) -> "EagleHeads":
        """Return loaded or new heads; those of EAGLE-3 guess among the data's own tokens."""
        from speclm.methods.eagle.training import (
            choose_columns,
            count_tokens,
            load_eagle_heads,
            new_eagle_heads,
        )
        from speclm.target import TargetView

        if self.init is not None:
            heads = load_eagle_heads(prepared.base, self.init, revision=self.init_revision)
            if heads.config.kind != self.kind:
                raise OptionError(
                    f"--init {self.init!r} are heads of {heads.config.kind}, expected {self.kind}; "
                    f"train them with: speclm train {heads.config.kind}"
                )
            return heads
        columns = None
        if self.kind == "eagle3":
            vocab_size = TargetView(prepared.base).vocab_size
            size = self.draft_vocab_size or min(MAX_DRAFT_VOCAB_SIZE, vocab_size)
            columns = choose_columns(count_tokens(prepared.rows, vocab_size=vocab_size), size)
        return new_eagle_heads(
            prepared.base,
            kind=self.kind,
            columns=columns,
            num_layers=self.num_layers or 1,
            seed=seed,
        )


@with_train_options(learning_rate=LEARNING_RATE)
def eagle(
    options: TrainOptions,
    *,
    num_layers: NumLayers = None,
    num_steps: NumSteps = 1,
    decay: Decay = 0.8,
    noise: Annotated[float, typer.Option(help="Width of the noise on the base's features.")] = 0.2,
    init: Init = None,
    init_revision: InitRevision = None,
) -> None:
    """Train heads of EAGLE-1, which EAGLE-2 uses too; the base stays as it is."""
    from speclm.methods.eagle.objective import EagleObjective

    usual = EagleObjective.usual("eagle")
    objective = replace(
        usual,
        num_steps=num_steps,
        num_measured=max(num_steps, usual.num_measured),
        decay=decay,
        noise=noise,
    )
    _train(options, _Start("eagle", init, num_layers, init_revision=init_revision), objective)


@with_train_options(learning_rate=LEARNING_RATE)
def eagle3(
    options: TrainOptions,
    *,
    draft_vocab_size: Annotated[
        int | None,
        typer.Option(
            help="Tokens that new heads guess among, the most frequent of the data; by default "
            f"all, at most {MAX_DRAFT_VOCAB_SIZE}."
        ),
    ] = None,
    num_layers: NumLayers = None,
    num_steps: NumSteps = 7,
    decay: Decay = 0.8,
    init: Init = None,
    init_revision: InitRevision = None,
) -> None:
    """Train heads of EAGLE-3; the base stays as it is."""
    from speclm.methods.eagle.objective import EagleObjective

    objective = replace(
        EagleObjective.usual("eagle3"), num_steps=num_steps, num_measured=num_steps, decay=decay
    )
    start = _Start("eagle3", init, num_layers, draft_vocab_size, init_revision)
    _train(options, start, objective)


def _train(options: TrainOptions, start: _Start, objective: "EagleObjective") -> None:
    from speclm.methods.eagle.training import EagleTrainer
    from speclm.training.arguments import EAGLE_DEFAULTS

    prepared = prepare(options, require_place=require_writable, defaults=EAGLE_DEFAULTS)
    make = partial(
        EagleTrainer,
        prepared.base,
        start.heads(prepared, seed=options.seed),
        prepared.arguments,
        train_dataset=prepared.rows,
        eval_dataset=prepared.eval_rows,
        objective=objective,
    )
    run_training(make, options)
