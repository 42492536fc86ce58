"""Medusa as a method: how its heads are recognised, loaded, saved and trained."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typing_extensions import override

from speclm.cards import HeadsCard
from speclm.config import MAX_DEPTH, require_count, require_in_range, require_options
from speclm.errors import OptionError
from speclm.methods.registry import HeadsSource, Method, Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainingArguments

    from speclm.drafting.heads_folder import Destination
    from speclm.drafting.interface import Proposer
    from speclm.files.weights import WeightFiles
    from speclm.methods.medusa.checkpoint import MedusaCheckpoint
    from speclm.training.heads_trainer import HeadsTrainer

_MAX_LAYERS = 64
_OPTIONS = ("dtype", "min_probability", "mixture", "num_draft_tokens", "tree")
_SUMMARY = """\
{num_heads} draft heads for speculative decoding. Head i drafts the token i + 2 positions after the
hidden state that it sees; the base model verifies all draft tokens in one forward.
"""
_SOFTWARE = """\
The files are `medusa_lm_head.safetensors` and `config.json`, named as TGI and vLLM up to 0.32
expect them; heads without an output matrix are read by TGI and speclm only.
"""


@dataclass(frozen=True, slots=True)
class MedusaTrainingOptions:
    """Options of ``speclm train medusa``."""

    num_heads: Annotated[int, "Heads: tokens that are drafted ahead."] = 5
    num_layers: Annotated[int, "Residual layers of each head."] = 1
    own_lm_head: Annotated[bool, "Give each head an output matrix of its own."] = False
    decay: Annotated[float, "Weight of a head relative to the one before it."] = 0.8
    soft_weight: Annotated[float, "Share of the loss against the base's own distribution."] = 0.0

    def __post_init__(self) -> None:
        require_count("--num-heads", self.num_heads, low=1, high=MAX_DEPTH)
        require_count("--num-layers", self.num_layers, low=1, high=_MAX_LAYERS)
        require_in_range("decay", self.decay, low=0.0, high=1.0)
        require_in_range("soft_weight", self.soft_weight, low=0.0, high=1.0)


class MedusaRecipe(Recipe):
    """Trains new Medusa heads."""

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
        from speclm.methods.medusa.training import (
            MedusaObjective,
            MedusaTrainingModel,
            new_medusa_heads,
        )
        from speclm.training.heads_trainer import HeadsTrainer

        heads = new_medusa_heads(
            base,
            num_heads=options.num_heads,
            num_layers=options.num_layers,
            has_own_lm_head=options.own_lm_head,
            seed=args.seed,
        )
        objective = MedusaObjective(decay=options.decay, soft_weight=options.soft_weight)
        return HeadsTrainer(
            MedusaTrainingModel(base, heads, objective=objective),
            args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
        )


class MedusaMethod(Method):
    """Heads that each draft one later token from one hidden state of the target."""

    name = "medusa"
    summary = "heads on the target's last hidden state, one for each position ahead"
    hints = ("medusa_lm_head.*",)
    recipes = (MedusaRecipe(),)

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
        from speclm.target import TargetView

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
        heads = build_medusa(checkpoint, TargetView(target), dtype=dtype)
        return MedusaProposer(heads, target=target, **options)

    @override
    def owns(self, proposer: "Proposer") -> bool:
        from speclm.methods.medusa.proposer import MedusaProposer

        return isinstance(proposer, MedusaProposer)

    @override
    def require_writable(self, folder: Path) -> None:
        from speclm.methods.medusa.checkpoint import require_writable

        require_writable(folder)

    @override
    def save(self, proposer: "Proposer", destination: "Destination") -> None:
        from speclm.methods.medusa.checkpoint import write_medusa
        from speclm.methods.medusa.network import medusa_checkpoint
        from speclm.methods.medusa.proposer import MedusaProposer

        assert isinstance(proposer, MedusaProposer)
        checkpoint = medusa_checkpoint(
            proposer.heads,
            base_name_or_path=destination.base_id,
            choices=proposer.config.paths,
        )
        card = medusa_card(checkpoint, repo_id=destination.repo_id).render()
        write_medusa(destination.folder, checkpoint, card=destination.card(card))

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
        num_parameters=sum(tensor.numel() for tensor in checkpoint.tensors.values()),
        dtype=str(checkpoint.dtype).removeprefix("torch."),
        num_nodes=None if choices is None else 1 + len(choices),
        base=checkpoint.base_name_or_path,
        repo_id=repo_id,
    )
