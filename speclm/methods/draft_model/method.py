"""Draft models as a method: any language model that shares the target's vocabulary."""

from dataclasses import fields
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from speclm.errors import CheckpointError, OptionError, UnknownNameError, UnsupportedModelError
from speclm.methods.registry import HeadsSource, Method, heads_names

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from speclm.drafting.interface import Proposer

_OPTIONS = (
    "dtype",
    "device_map",
    "revision",
    "quantization_config",
    "attn_implementation",
)
"""Options of ``from_pretrained`` that messages suggest; it takes others too."""


class DraftModelMethod(Method):
    """A smaller language model with the target's vocabulary; loads any model folder."""

    name = "draft_model"
    summary = "a smaller language model with the target's vocabulary"
    aliases = ("draft",)

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
                f"folder needs a config.json and weights ({error})"
            ) from error
        return wrap_draft_model(draft, target, options)

    @override
    def owns(self, proposer: "Proposer") -> bool:
        from speclm.methods.draft_model.chain_proposer import ChainDraftProposer
        from speclm.methods.draft_model.proposer import DraftModelProposer

        return isinstance(proposer, DraftModelProposer | ChainDraftProposer)


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
