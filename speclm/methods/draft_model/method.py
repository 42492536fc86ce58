"""Draft models as a method: any language model that shares the target's vocabulary."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typing_extensions import override

from speclm.config import (
    require_count,
    require_in_range,
    require_one_start,
    require_positive,
    require_size,
)
from speclm.errors import (
    CheckpointError,
    OptionError,
    UnknownNameError,
    UnsupportedModelError,
    reason_of,
)
from speclm.methods.registry import HeadsSource, Method, Recipe, heads_names

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainingArguments

    from speclm.cards import HeadsCard
    from speclm.drafting.interface import Proposer
    from speclm.files.weights import WeightFiles
    from speclm.training.heads_trainer import HeadsTrainer

_OPTIONS = (
    "dtype",
    "device_map",
    "revision",
    "quantization_config",
    "attn_implementation",
)
"""Options of ``from_pretrained`` that messages suggest; it takes others too."""

_MAX_SIZE = 2**20
_COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
)
"""Files that a training writes with a draft model, as far as its tokenizer has them."""


@dataclass(frozen=True, slots=True)
class DraftTrainingOptions:
    """Options of ``speclm train draft``."""

    hidden_size: Annotated[
        int | None, "Width of a new draft model; a quarter of the base's by default."
    ] = None
    num_layers: Annotated[int | None, "Decoder layers of a new draft model; 2 by default."] = None
    num_heads: Annotated[
        int | None, "Attention heads of a new draft model; one for each 64 of the width by default."
    ] = None
    untied: Annotated[bool, "Give a new draft model an output matrix next to the embeddings."] = (
        False
    )
    temperature: Annotated[
        float, "Temperature of both distributions in the divergence from the base."
    ] = 1.0
    token_weight: Annotated[
        float, "Share of the loss on the texts' tokens; the rest is the divergence."
    ] = 0.0
    init: Annotated[
        str | None,
        "Folder or hub id of a language model of the same vocabulary to start from; its files are "
        "not changed.",
    ] = None
    init_revision: Annotated[str | None, "Branch, tag or commit of --init on the hub."] = None

    def __post_init__(self) -> None:
        sizes: dict[str, object] = {
            "--hidden-size": self.hidden_size,
            "--num-layers": self.num_layers,
            "--num-heads": self.num_heads,
        }
        for name, size in sizes.items():
            if size is not None:
                require_size(name, size)
                require_count(name, size, low=1, high=_MAX_SIZE)
        require_positive("--temperature", self.temperature)
        require_in_range("--token-weight", self.token_weight, low=0.0, high=1.0)
        sizes["--untied"] = self.untied
        require_one_start(self.init, self.init_revision, sizes, owner="weights")


class DraftRecipe(Recipe):
    """Distils a new or loaded draft model from the base."""

    name = "draft"
    trains_heads_only = False
    summary = "Distil a draft model, a small language model; the base stays as it is."
    options = DraftTrainingOptions

    @override
    def trainer(
        self,
        base: "PreTrainedModel",
        args: "TrainingArguments",
        *,
        options: DraftTrainingOptions,
        train_dataset: Any,
        eval_dataset: Any = None,
    ) -> "HeadsTrainer":
        from speclm.methods.draft_model.objective import DraftObjective, DraftTrainingModel
        from speclm.methods.draft_model.training import load_draft_model, new_draft_model
        from speclm.training.heads_trainer import HeadsTrainer
        from speclm.training.training_model import tokenizer_of

        if options.init is not None:
            draft = load_draft_model(options.init, revision=options.init_revision)
        else:
            draft = new_draft_model(
                base,
                hidden_size=options.hidden_size,
                num_layers=options.num_layers or 2,
                num_heads=options.num_heads,
                is_tied=not options.untied,
                seed=args.seed,
            )
        objective = DraftObjective(
            temperature=options.temperature, token_weight=options.token_weight
        )
        return HeadsTrainer(
            DraftTrainingModel(base, draft, tokenizer=tokenizer_of(base), objective=objective),
            args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
        )


class DraftModelMethod(Method):
    """A smaller language model with the target's vocabulary; loads any model folder."""

    name = "draft_model"
    summary = "a smaller language model with the target's vocabulary"
    aliases = ("draft",)
    recipes = (DraftRecipe(),)

    @override
    def find_weights(self, folder: Path) -> "WeightFiles | None":
        from speclm.files.weights import weight_files
        from speclm.methods.draft_model.training import is_trained_here

        return next(iter(weight_files(folder)), None) if is_trained_here(folder) else None

    @override
    def is_likely(self, folder: Path) -> bool:
        from speclm.methods.draft_model.training import is_trained_here

        return is_trained_here(folder)

    @override
    def card(self, folder: Path) -> "HeadsCard":
        from speclm.methods.draft_model.training import read_card

        return read_card(folder)

    @override
    def companions(self, folder: Path) -> list[Path]:
        return [folder / name for name in _COMPANIONS if (folder / name).is_file()]

    @override
    def takes(self, heads: object) -> bool:
        from transformers import PreTrainedModel

        from speclm.target.loading import is_adapted

        return isinstance(heads, PreTrainedModel) or is_adapted(heads)

    @override
    def load(self, source: HeadsSource, target: "PreTrainedModel") -> "Proposer":
        from transformers import PreTrainedModel

        from speclm.methods.draft_model.proposer import DraftModelConfig
        from speclm.target import TargetView
        from speclm.target.loading import load_causal_lm, without_adapter

        names = {option.name for option in fields(DraftModelConfig)}
        options = {name: value for name, value in source.options.items() if name in names}
        loading = {name: value for name, value in source.options.items() if name not in names}
        draft = without_adapter(source.given)
        if isinstance(draft, PreTrainedModel):
            if loading:
                raise OptionError(
                    f"heads is a loaded model and heads_kwargs {sorted(loading)!r} would have no "
                    f"effect, known options are {sorted(names)!r}; pass others where the model is "
                    "loaded"
                )
            return wrap_draft_model(draft, target, options)
        device = TargetView(target).device
        loading = {"dtype": target.dtype, "device_map": {"": device}, **loading, **source.hub}
        heads: Any = source.given
        try:
            draft = load_causal_lm(
                heads, loading, owner="draft model", known=(*_OPTIONS, *sorted(names))
            )
        except (OptionError, CheckpointError):
            raise
        except (OSError, ValueError) as error:
            raise UnknownNameError(
                f"heads {str(heads)!r} is not a registered proposer, nor a folder or hub id of a "
                f"causal language model or of draft heads; registered are {heads_names()!r}, and a "
                f"folder needs a config.json and weights ({reason_of(error)})"
            ) from error
        return wrap_draft_model(draft, target, options)

    @override
    def owns(self, proposer: "Proposer") -> bool:
        from speclm.methods.draft_model.chain_proposer import ChainDraftProposer
        from speclm.methods.draft_model.proposer import DraftModelProposer

        return isinstance(proposer, DraftModelProposer | ChainDraftProposer)

    @override
    def require_writable(self, folder: Path) -> None:
        from speclm.methods.draft_model.training import require_writable

        require_writable(folder)


def wrap_draft_model(
    draft: "PreTrainedModel", target: "PreTrainedModel", options: dict[str, Any]
) -> "Proposer":
    """Return the proposer for a draft model: one of trees if possible, else one of chains.

    Raises:
        UnsupportedModelError: If it fails the self-check for both.
    """
    from speclm.methods.draft_model.chain_proposer import ChainDraftProposer
    from speclm.methods.draft_model.proposer import DraftModelProposer
    from speclm.self_check.check import check_model
    from speclm.self_check.verdict import Verification
    from speclm.target import TargetView

    view = TargetView(draft)
    check = check_model(view)
    if check.verification is Verification.TREES:
        return DraftModelProposer(draft, target=target, **options)
    if check.verification is Verification.CHAINS:
        return ChainDraftProposer(draft, target=target, **options)
    raise UnsupportedModelError(
        f"draft model {view.name} can draft neither trees nor chains: {check.reason}; choose one "
        "of a family that passes the self-check, such as Llama or Qwen"
    )
