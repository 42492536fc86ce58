"""Hidden states that a proposer requests, and hooks that read them during forwards."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PretrainedConfig

from speclm.errors import UnsupportedModelError
from speclm.forking import temporary


@dataclass(frozen=True)
class TargetFeatures:
    """Hidden states of the target that a proposer needs, concatenated.

    Args:
        layers: Their indices, as in Transformers' `hidden_states`: i is the input of decoder layer
            i, so 0 the embeddings; -1 is the input of the head, the decoder's output after the
            final norm.
    """

    layers: tuple[int, ...] = ()

    NONE: ClassVar["TargetFeatures"]
    LAST_HIDDEN: ClassVar["TargetFeatures"]

    @classmethod
    def union(cls, wanted: Iterable["TargetFeatures"]) -> "TargetFeatures":
        """Return the hidden states that any of several proposers needs, each once, -1 last."""
        layers = {layer for features in wanted for layer in features.layers}
        return cls(tuple(sorted(layers, key=lambda layer: (layer < 0, layer))))

    def select(
        self, states: Float[Tensor, "batch seq hidden"], wanted: "TargetFeatures"
    ) -> Float[Tensor, "batch seq wanted_hidden"]:
        """Return the part of these features that one proposer needs.

        Args:
            states: Hidden states of `layers`, concatenated and equally wide.
            wanted: Some of `layers`.
        """
        if wanted == self:
            return states
        parts = states.chunk(len(self.layers), dim=-1)
        return torch.cat([parts[self.layers.index(layer)] for layer in wanted.layers], dim=-1)


TargetFeatures.NONE = TargetFeatures()
TargetFeatures.LAST_HIDDEN = TargetFeatures((-1,))


def last_logits(config: PretrainedConfig, features: TargetFeatures) -> int | Tensor:
    """Return the `logits_to_keep` with which a prompt has logits after its last token only.

    If its features are read, it is an index, of which models do not know how many positions they
    need. With a count, Gemma 4 computes only those in the layers that share keys and values.
    """
    has_shared = bool(getattr(config, "num_kv_shared_layers", 0))
    if not has_shared or not features.layers:
        return 1
    return torch.tensor([-1], dtype=torch.long, device="cpu")


class FeatureTap:
    """Read features during the forwards that its owner runs; ignore those of others."""

    def __init__(
        self,
        features: TargetFeatures,
        *,
        is_own: Callable[[], bool],
        take: Callable[[Tensor], None],
    ) -> None:
        """Create a tap, which reads inside `on`.

        Args:
            features: Which hidden states.
            is_own: Returns whether the running forward is the owner's.
            take: Called with ``[batch, nodes, width]`` at the end of the decoder.
        """
        self.features, self._is_own, self._take = features, is_own, take
        self._found: dict[int, Tensor] = {}
        self._decoder: nn.Module | None = None
        self._layers: Any = None
        self._handles: list[RemovableHandle] = []

    @contextmanager
    def on(self, decoder: nn.Module, num_layers: int) -> Iterator[None]:
        """Read from a decoder, the model below the head.

        Raises:
            UnsupportedModelError: If the decoder has no such layer.
        """
        indices = self.features.layers
        inner = [index for index in indices if index >= 0]
        if inner and max(inner) >= num_layers:
            raise UnsupportedModelError(
                f"features of layer {max(inner)} are requested, the target has layers 0 to "
                f"{num_layers - 1}; use heads that were made for this target"
            )
        self._decoder, self._layers = decoder, ()
        if inner:
            self._layers = decoder_layers(decoder, num_layers)
        with temporary(self._remove):
            self._add()
            yield

    @contextmanager
    def off(self) -> Iterator[None]:
        """Have no hooks inside the block."""
        self._remove()
        try:
            yield
        finally:
            self._add()

    def _add(self) -> None:
        # No closures: a model may be copied or pickled while it runs.
        for index in self.features.layers:
            if index >= 0:
                layer, read = self._layers[index], partial(self._read, index)
                self._handles.append(layer.register_forward_pre_hook(read, with_kwargs=True))
        if self.features.layers and self._decoder is not None:
            self._handles.append(self._decoder.register_forward_hook(self._end))

    def _remove(self) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _read(
        self,
        index: int,
        module: nn.Module,  # noqa: ARG002
        arguments: tuple[Any, ...],
        named: dict[str, Any],
    ) -> None:
        if self._is_own():
            self._found[index] = arguments[0] if arguments else named["hidden_states"]

    def _end(self, module: nn.Module, arguments: object, output: Any) -> None:  # noqa: ARG002
        if self._is_own():
            self._found[-1] = output[0]
            self._take(torch.cat([self._found[index] for index in self.features.layers], dim=-1))
            self._found.clear()


def is_tap(hook: object) -> bool:
    """Return whether a forward hook belongs to a `FeatureTap`, which only reads."""
    method = hook.func if isinstance(hook, partial) else hook
    return isinstance(getattr(method, "__self__", None), FeatureTap)


def decoder_layers(decoder: nn.Module, num_layers: int) -> nn.ModuleList:
    """Return the decoder's layers: the outermost list of as many modules.

    Raises:
        UnsupportedModelError: If there is no such list.
    """
    for module in decoder.modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_layers:
            return module
    raise UnsupportedModelError(
        f"{type(decoder).__name__} has no list of its {num_layers} layers, whose features are "
        "requested; use a proposer that needs none"
    )
