"""Medusa as a method: how its heads are recognised, loaded, saved and trained."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from typing_extensions import override

from speclm.cards import HeadsCard
from speclm.config import (
    MAX_DEPTH,
    require_count,
    require_in_range,
    require_one_start,
    require_options,
    require_positive,
)
from speclm.errors import OptionError
from speclm.methods.registry import HeadsSource, Method, Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainingArguments

    from speclm.drafting.formats import CheckpointFormat
    from speclm.drafting.heads_folder import Destination
    from speclm.drafting.interface import Proposer
    from speclm.files.weights import WeightFiles
    from speclm.methods.medusa.checkpoint import MedusaCheckpoint
    from speclm.methods.medusa.network import MedusaHeads
    from speclm.training.heads_trainer import HeadsTrainer

OUTPUTS = ("adapter", "merged")
"""What a training writes of a base that it tunes: its adapter, or the base merged with it."""

MAX_RANK = 1024
"""Maximum rank of an adapter."""

_MAX_LAYERS = 64
_OPTIONS = ("dtype", "min_probability", "mixture", "num_draft_tokens", "tree")
_SUMMARY = """\
{num_heads} draft heads for speculative decoding. Head i drafts the token i + 2 positions after the
hidden state that it sees; the base model verifies all draft tokens in one forward.
"""
_SOFTWARE = """\
The files are `medusa_lm_head.safetensors` and `config.json`. For TGI, vLLM up to 0.32, RTP-LLM and
FasterDecoding's Medusa they are converted with `speclm convert`.
"""


@dataclass(frozen=True, slots=True)
class _TrainingOptions:
    num_heads: Annotated[int | None, "New heads: tokens that are drafted ahead; 5 by default."] = (
        None
    )
    num_layers: Annotated[int | None, "Residual layers of each new head; 1 by default."] = None
    own_lm_head: Annotated[bool, "Give each head an output matrix of its own."] = False
    decay: Annotated[float, "Weight of a head relative to the one before it."] = 0.8
    soft_weight: Annotated[float, "Share of the loss against the base's own distribution."] = 0.0
    init: Annotated[
        str | None, "Folder or hub id of heads to start from; its files are not changed."
    ] = None
    init_revision: Annotated[str | None, "Branch, tag or commit of --init on the hub."] = None

    def __post_init__(self) -> None:
        if self.num_heads is not None:
            require_count("--num-heads", self.num_heads, low=1, high=MAX_DEPTH)
        if self.num_layers is not None:
            require_count("--num-layers", self.num_layers, low=1, high=_MAX_LAYERS)
        require_in_range("decay", self.decay, low=0.0, high=1.0)
        require_in_range("soft_weight", self.soft_weight, low=0.0, high=1.0)
        sizes = {
            "--num-heads": self.num_heads,
            "--num-layers": self.num_layers,
            "--own-lm-head": self.own_lm_head,
        }
        require_one_start(self.init, self.init_revision, sizes)


@dataclass(frozen=True, slots=True)
class MedusaTrainingOptions(_TrainingOptions):
    """Options of ``speclm train medusa``."""


@dataclass(frozen=True, slots=True)
class Medusa2TrainingOptions(_TrainingOptions):
    """Options of ``speclm train medusa2``."""

    rank: Annotated[int, "Rank of the base's adapter."] = 32
    alpha: Annotated[float, "Factor of the adapter, multiplied by the rank."] = 16.0
    heads_warmup: Annotated[
        float, "Steps in which only the heads are trained; below 1, a share of all steps."
    ] = 0.4
    heads_weight: Annotated[
        float, "Weight of the heads' loss for the base, which it grows to during the training."
    ] = 0.2
    heads_rate: Annotated[
        float, "Learning rate of the heads relative to that of the base's adapter."
    ] = 4.0
    distillation: Annotated[
        float,
        "Share of the divergence from the base as it was in the loss of the base; the rest is on "
        "the texts' tokens.",
    ] = 1.0
    output: Annotated[
        str, "What is written of the base: adapter, or merged for the whole base."
    ] = "adapter"

    def __post_init__(self) -> None:
        _TrainingOptions.__post_init__(self)  # super() does not work in a slotted dataclass
        require_count("--rank", self.rank, low=1, high=MAX_RANK)
        require_positive("--alpha", self.alpha)
        require_in_range("--heads-warmup", self.heads_warmup, low=0.0, high=2**31)
        require_in_range("--heads-weight", self.heads_weight, low=0.0, high=1e6)
        require_positive("--heads-rate", self.heads_rate)
        require_in_range("--distillation", self.distillation, low=0.0, high=1.0)
        if self.output not in OUTPUTS:
            raise OptionError(
                f"--output is {self.output!r}, expected one of {OUTPUTS!r}; choose one"
            )


def _heads(base: "PreTrainedModel", options: _TrainingOptions, *, seed: int) -> "MedusaHeads":
    """Return loaded or new heads."""
    from speclm.methods.medusa.training import load_medusa_heads, new_medusa_heads

    if options.init is not None:
        return load_medusa_heads(base, options.init, revision=options.init_revision)
    return new_medusa_heads(
        base,
        num_heads=options.num_heads or 5,
        num_layers=options.num_layers or 1,
        has_own_lm_head=options.own_lm_head,
        seed=seed,
    )


class MedusaRecipe(Recipe):
    """Trains new or loaded Medusa heads."""

    name = "medusa"
    summary = "Train Medusa heads; the base stays as it is."
    options = MedusaTrainingOptions

    @override
    def trainer(
        self,
        base: "PreTrainedModel",
        args: "TrainingArguments",
        *,
        options: MedusaTrainingOptions,
        train_dataset: Any,
        eval_dataset: Any = None,
    ) -> "HeadsTrainer":
        from speclm.methods.medusa.training import MedusaObjective, MedusaTrainingModel
        from speclm.training.heads_trainer import HeadsTrainer

        heads = _heads(base, options, seed=args.seed)
        objective = MedusaObjective(decay=options.decay, soft_weight=options.soft_weight)
        return HeadsTrainer(
            MedusaTrainingModel(base, heads, objective=objective),
            args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
        )


class Medusa2Recipe(Recipe):
    """Trains new or loaded Medusa heads together with an adapter of the base."""

    name = "medusa2"
    trains_heads_only = False
    summary = "Train Medusa heads together with an adapter of the base, which changes the base."
    options = Medusa2TrainingOptions
    # The heads then have the usual learning rate, and the adapter a quarter of it.
    defaults: ClassVar[Mapping[str, Any]] = {"learning_rate": 2.5e-4}

    @override
    def trainer(
        self,
        base: "PreTrainedModel",
        args: "TrainingArguments",
        *,
        options: Medusa2TrainingOptions,
        train_dataset: Any,
        eval_dataset: Any = None,
    ) -> "HeadsTrainer":
        from speclm.methods.medusa.training import MedusaObjective
        from speclm.methods.medusa.tuning import (
            MedusaTuningModel,
            Stages,
            TuningObjective,
        )
        from speclm.training.adapter import Adapter, require_part
        from speclm.training.heads_trainer import HeadsTrainer
        from speclm.training.training_model import tokenizer_of

        require_part(Path(str(args.output_dir)), options.output)
        objective = TuningObjective(
            heads=MedusaObjective(decay=options.decay, soft_weight=options.soft_weight),
            heads_weight=options.heads_weight,
            heads_warmup=options.heads_warmup,
            distillation=options.distillation,
            heads_rate=options.heads_rate,
        )
        heads = _heads(base, options, seed=args.seed)  # before the adapter changes the base
        model = MedusaTuningModel(
            base,
            heads,
            Adapter(base, rank=options.rank, alpha=options.alpha, seed=args.seed),
            objective=objective,
            output=options.output,
            tokenizer=tokenizer_of(base),
        )
        return HeadsTrainer(
            model,
            args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            callbacks=[Stages(model)],
        )


class MedusaMethod(Method):
    """Heads that each draft one later token from one hidden state of the target."""

    name = "medusa"
    summary = "heads on the target's last hidden state, one for each position ahead"
    hints = ("medusa_lm_head.*",)
    stores_trees = True
    recipes = (MedusaRecipe(), Medusa2Recipe())

    @override
    def find_weights(self, folder: Path) -> "WeightFiles | None":
        from speclm.methods.medusa.checkpoint import find_medusa

        return find_medusa(folder)

    @override
    def is_likely(self, folder: Path) -> bool:
        from speclm.files.weights import read_text

        return (
            any(folder.glob(self.hints[0]))
            or '"medusa' in read_text(folder / "config.json")
            or any('"medusa_head' in read_text(index) for index in folder.glob("*.index.json"))
        )

    @override
    def load(self, source: HeadsSource, target: "PreTrainedModel") -> "Proposer":
        from speclm.files.weights import floating_dtype
        from speclm.methods.medusa.checkpoint import read_medusa
        from speclm.methods.medusa.network import build_medusa
        from speclm.methods.medusa.proposer import MedusaProposer
        from speclm.target import TargetView, stored_matrices

        require_options(source.options, _OPTIONS, owner="Medusa heads")
        assert source.folder is not None
        checkpoint = read_medusa(source.folder)
        base_name = target.config.name_or_path
        if checkpoint.is_merged and base_name not in {str(source.given), str(source.folder)}:
            raise OptionError(
                f"{source.given} holds a model merged with its heads, which were trained together; "
                f"the base is {base_name!r}, load the base from {str(source.given)!r} too"
            )
        options = {"tree": checkpoint.choices, **source.options}
        dtype = floating_dtype(options.pop("dtype", target.dtype))
        checkpoint = checkpoint.share(stored_matrices(target)["lm_weight"])
        view = TargetView(target)
        heads = build_medusa(
            checkpoint, vocab_size=view.vocab_size, dtype=dtype, device=view.device
        )
        return MedusaProposer(heads, target=target, **options)

    @override
    def owns(self, proposer: "Proposer") -> bool:
        from speclm.methods.medusa.proposer import MedusaProposer

        return isinstance(proposer, MedusaProposer)

    @override
    def require_writable(self, folder: Path) -> None:
        from speclm.methods.medusa.checkpoint_writing import require_writable

        require_writable(folder)

    @override
    def checkpoint(self, proposer: "Proposer", destination: "Destination") -> "MedusaCheckpoint":
        from speclm.methods.medusa.network import medusa_checkpoint
        from speclm.methods.medusa.proposer import MedusaProposer

        assert isinstance(proposer, MedusaProposer)
        return medusa_checkpoint(
            proposer.heads,
            base_name_or_path=destination.base_id,
            choices=proposer.config.paths,
        )

    @override
    def save(self, proposer: "Proposer", destination: "Destination") -> None:
        from speclm.methods.medusa.checkpoint_writing import write_medusa

        checkpoint = self.checkpoint(proposer, destination)
        card = medusa_card(checkpoint, repo_id=destination.repo_id).render()
        write_medusa(destination.folder, checkpoint, card=destination.card(card))

    @override
    def formats(self) -> "tuple[CheckpointFormat[Any], ...]":
        from speclm.methods.medusa.checkpoint_formats import MEDUSA_FORMATS

        return MEDUSA_FORMATS

    @override
    def card(self, folder: Path) -> HeadsCard:
        from speclm.methods.medusa.checkpoint import read_medusa

        checkpoint = read_medusa(folder)
        if checkpoint.is_merged:
            raise OptionError(
                f"{folder}: found a whole model merged with its heads, expected heads; upload it "
                "with: hf upload"
            )
        return medusa_card(checkpoint)


def medusa_card(checkpoint: "MedusaCheckpoint", *, repo_id: str | None = None) -> HeadsCard:
    """Return the model card of Medusa heads."""
    choices = checkpoint.choices
    return HeadsCard(
        kind="medusa",
        title="Medusa heads",
        summary=_SUMMARY.format(num_heads=checkpoint.num_heads),
        facts={
            "heads": checkpoint.num_heads,
            "residual layers of each head": checkpoint.num_layers,
            "output matrix": "one in each head"
            if checkpoint.has_own_lm_head
            else "the base model's",
        },
        software=_SOFTWARE,
        num_parameters=sum(tensor.numel() for tensor in checkpoint.parts.values()),
        dtype=str(checkpoint.dtype).removeprefix("torch."),
        num_nodes=None if choices is None else len(choices),
        base=checkpoint.base_name_or_path,
        repo_id=repo_id,
    )
