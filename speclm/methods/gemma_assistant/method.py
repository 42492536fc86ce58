"""Assistants of Gemma 4 as a method: how they are recognised and loaded."""

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from typing_extensions import override

from speclm.errors import OptionError
from speclm.methods.registry import HeadsSource, Method

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from speclm.cards import HeadsCard
    from speclm.drafting.heads_folder import Destination
    from speclm.drafting.interface import Proposer
    from speclm.files.weights import WeightFiles

TYPES = ("gemma4_assistant", "gemma4_unified_assistant")
"""Types of assistants in their configs."""


class GemmaAssistantMethod(Method):
    """A small model that reads the keys and values of a Gemma 4."""

    name = "gemma_assistant"
    summary = "an assistant of Gemma 4, which reads the target's keys and values"
    aliases: ClassVar[tuple[str, ...]] = ("assistant",)

    @override
    def takes(self, heads: object) -> bool:
        return getattr(getattr(heads, "config", None), "model_type", None) in TYPES

    @override
    def find_weights(self, folder: Path) -> "WeightFiles | None":
        from speclm.files.weights import weight_files

        return next(iter(weight_files(folder)), None) if self.is_declared(folder) else None

    @override
    def is_declared(self, folder: Path) -> bool:
        from speclm.files.atomic import read_json

        try:
            return read_json(folder / "config.json")["model_type"] in TYPES
        except (OSError, ValueError, KeyError, TypeError):
            return False

    @override
    def is_likely(self, folder: Path) -> bool:
        return self.is_declared(folder)

    @override
    def load(self, source: HeadsSource, target: "PreTrainedModel") -> "Proposer":
        from transformers import PreTrainedModel

        from speclm.methods.gemma_assistant.checkpoint import load_assistant
        from speclm.methods.gemma_assistant.proposer import (
            GemmaAssistantConfig,
            GemmaAssistantProposer,
        )
        from speclm.target import TargetView
        from speclm.target.loading import without_adapter

        names = {"tree", *(option.name for option in fields(GemmaAssistantConfig))}
        options = {name: value for name, value in source.options.items() if name in names}
        loading = {name: value for name, value in source.options.items() if name not in names}
        model: Any = without_adapter(source.given)
        if not isinstance(model, PreTrainedModel):
            assert source.folder is not None
            model = load_assistant(
                source.folder, TargetView(target), loading, known=tuple(sorted(names))
            )
        elif loading:
            raise OptionError(
                f"heads is a loaded model and heads_kwargs {sorted(loading)!r} would have no "
                f"effect, known options are {sorted(names)!r}; pass others where the model is "
                "loaded"
            )
        return GemmaAssistantProposer(model, target=target, **options)

    @override
    def owns(self, proposer: "Proposer") -> bool:
        from speclm.methods.gemma_assistant.proposer import GemmaAssistantProposer

        return isinstance(proposer, GemmaAssistantProposer)

    @override
    def save(self, proposer: "Proposer", destination: "Destination") -> None:
        raise _is_transformers_own()

    @override
    def checkpoint(self, proposer: "Proposer", destination: "Destination") -> Any:
        raise _is_transformers_own()

    @override
    def card(self, folder: Path) -> "HeadsCard":
        raise _is_transformers_own()


def _is_transformers_own() -> OptionError:
    return OptionError(
        "an assistant of Gemma 4 is a model of Transformers, expected heads of speclm, which "
        "are saved and published with a card; save it with proposer.model.save_pretrained, and "
        "publish its folder with: hf upload"
    )
