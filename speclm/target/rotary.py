"""Rotary embeddings whose frequencies depend on the length of the text."""

from dataclasses import dataclass
from typing import Any, cast

from transformers import GenerationMixin, PreTrainedModel


@dataclass(frozen=True, slots=True)
class RotarySwitch:
    """The position at which a model switches to another rotation, for all rows of a forward.

    Keys keep the rotation of the forward that computed them. A forward must therefore not cross the
    switch unless regular generation's does, and all rows must reach it at the same time.

    Args:
        num_positions: Positions before the switch.
        is_gradual: Whether the rotation changes again with every position after it.
        reads_again: Whether regular generation reads the whole text again at the switch.
    """

    num_positions: int
    is_gradual: bool
    reads_again: bool

    def excludes_drafts(self, root: int, depth: int) -> bool:
        """Return whether a draft would be rotated differently than in regular generation.

        Args:
            root: Maximum position of a root.
            depth: Depth of the draft.
        """
        if root >= self.num_positions:
            return self.is_gradual
        return root + depth >= self.num_positions

    def is_met(self, first: int, last: int) -> bool:
        """Return whether positions from `first` to `last` are rotated in different ways."""
        return last >= self.num_positions and (self.is_gradual or first < self.num_positions)


def rotary_switch(model: PreTrainedModel) -> RotarySwitch | None:
    """Return where the rotation of a model's keys changes; None if it never does.

    If layers switch at different lengths, this is the first of them.
    """
    parameters = getattr(model.config.get_text_config(), "rope_parameters", None)
    kinds = _rope_types(parameters)
    is_gradual = any("dynamic" in kind for kind in kinds)
    if not is_gradual and "longrope" not in kinds:
        return None
    bounds = [
        *(bound for module in model.modules() if (bound := _grows_from(module)) is not None),
        *(_original_lengths(parameters) if "longrope" in kinds else []),
    ]
    prepare = cast("Any", type(model)).prepare_inputs_for_generation
    return RotarySwitch(
        num_positions=min(bounds, default=0),
        is_gradual=is_gradual,
        reads_again="longrope" in kinds
        and prepare is not GenerationMixin.prepare_inputs_for_generation,
    )


def _grows_from(module: Any) -> int | None:
    """Return the length at which a module may have other frequencies; None if they are constant.

    It computes new frequencies beyond its original length and keeps them until it sees a shorter
    text. A text of exactly that length therefore keeps the frequencies of an earlier one.
    """
    kinds = getattr(module, "rope_type", None)
    kinds = kinds.values() if isinstance(kinds, dict) else [kinds]
    is_dynamic = any(isinstance(kind, str) and "dynamic" in kind for kind in kinds)
    return int(module.original_max_seq_len) - 1 if is_dynamic else None


def _rope_types(parameters: object) -> list[str]:
    """Return the rope types in a config's parameters, which may be per layer type."""
    return [str(value) for value in _values(parameters, "rope_type")]


def _original_lengths(parameters: object) -> list[int]:
    return [int(value) for value in _values(parameters, "original_max_position_embeddings")]


def _values(parameters: object, name: str) -> list[Any]:
    if not isinstance(parameters, dict):
        return []
    nested = [found for value in parameters.values() for found in _values(value, name)]
    return [*nested, parameters[name]] if parameters.get(name) is not None else nested
