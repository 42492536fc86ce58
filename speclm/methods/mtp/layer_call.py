"""Run the only layer of a decoder without the decoder around it, a third of the time."""

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from speclm.attention import TreeStep, attached, attention_configs, tree_step
from speclm.cache import CACHE_NAME, TreeCache

_COMPUTED = {"attention_mask", "position_embeddings", "position_ids", CACHE_NAME}
_PARENTS = ((0, 0, 1, 2, 3), (0,), (0, 0, 0, 2))  # of a text, a single node and a tree
_TOLERANCE = 1e-3  # of the largest state; the same operations in the same order


@dataclass(frozen=True, slots=True)
class LayerCall:
    """How a decoder calls its layer.

    Args:
        names: Arguments that are computed for each call.
        constants: All others.
        window: Window of its mask; None for full attention.
        rotary_arguments: Arguments of the decoder's rotation besides states and positions.
    """

    names: frozenset[str]
    constants: Mapping[str, Any]
    window: int | None
    rotary_arguments: Mapping[str, Any]

    def takes(self, step: TreeStep) -> bool:
        """Return whether a step can be run; the decoder makes the masks of a regular one itself."""
        return self.window is None or not step.is_regular

    def run(
        self,
        decoder: PreTrainedModel,
        states: Float[Tensor, "batch seq hidden"],
        positions: Int[Tensor, "batch seq"],
        *,
        step: TreeStep,
        cache: TreeCache,
    ) -> Float[Tensor, "batch seq hidden"]:
        """Return what the decoder returns for a step that it takes, and is active."""
        parts: Any = decoder
        computed: dict[str, Any] = {CACHE_NAME: cache, "position_ids": positions}
        if "attention_mask" in self.names:
            computed["attention_mask"] = step.lazy_bias(self.window, states.dtype)
        if "position_embeddings" in self.names:
            rotation = parts.rotary_emb(states, positions, **self.rotary_arguments)
            computed["position_embeddings"] = rotation
        arguments = {name: computed[name] for name in self.names}
        found = parts.layers[0](states, **arguments, **self.constants)
        normed: Tensor = parts.norm(found[0] if isinstance(found, tuple) else found)
        return normed


class LayerRunner:
    """Runs a decoder of one layer over new nodes; by its layer alone where that is the same."""

    def __init__(self, decoder: PreTrainedModel) -> None:
        """Look how the decoder calls its layer, in a few forwards on its device."""
        self.decoder, self.call = decoder, cast("LayerCall | None", None)
        self._configs = attention_configs(decoder)
        self.call = _find_call(self)

    def run(
        self,
        states: Float[Tensor, "batch seq hidden"],
        positions: Int[Tensor, "batch seq"],
        *,
        step: TreeStep,
        cache: TreeCache,
    ) -> Float[Tensor, "batch seq hidden"]:
        """Return the decoder's last hidden states for the nodes of a step."""
        with attached(self._configs), tree_step(step):
            if self.call is not None and self.call.takes(step):
                return self.call.run(self.decoder, states, positions, step=step, cache=cache)
            inputs: dict[str, Any] = {"inputs_embeds": states, CACHE_NAME: cache}
            output = self.decoder(**inputs, position_ids=positions, use_cache=True)
            found: Tensor = output.last_hidden_state
            return found


@torch.no_grad()
def _find_call(runner: LayerRunner) -> LayerCall | None:
    """Return how a decoder calls its layer; None if that cannot be done without the decoder.

    The decoder is watched in forwards over random states, and the results are compared.
    """
    given: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    decoder: Any = runner.decoder
    handle = decoder.layers[0].register_forward_pre_hook(
        lambda _, arguments, named: given.append((arguments, named)), with_kwargs=True
    )
    try:
        expected, windows = _outputs(runner)
    finally:
        handle.remove()
    arguments, named = given[0]
    constants = {name: value for name, value in named.items() if name not in _COMPUTED}
    are_constant = not any(isinstance(value, Tensor) for value in constants.values())
    if len(arguments) != 1 or len(windows) != 1 or not are_constant:
        return None
    names = frozenset(name for name in named.keys() & _COMPUTED if named[name] is not None)
    kinds = getattr(decoder.config, "layer_types", None)
    try:
        rotary = inspect.signature(decoder.rotary_emb.forward).parameters
        rotary_arguments = {"layer_type": kinds[0]} if kinds and "layer_type" in rotary else {}
        runner.call = LayerCall(names, constants, next(iter(windows)), rotary_arguments)
        found, _ = _outputs(runner)
    except Exception:  # noqa: BLE001 - of any modeling code
        return None
    tolerance = _TOLERANCE * float(expected.abs().max())
    if not math.isfinite(tolerance):
        return None  # damaged weights, of which nothing can be compared
    return runner.call if torch.allclose(found, expected, rtol=0, atol=tolerance) else None


def _outputs(
    runner: LayerRunner,
) -> tuple[Float[Tensor, "1 nodes hidden"], set[int | None]]:
    """Return outputs for a text, a node and a tree, and the windows of the masks asked for."""
    weight = next(cast("Any", runner.decoder).norm.parameters())
    device, windows = weight.device, set[int | None]()
    cache = TreeCache(num_layers=1, num_padding=torch.zeros(1, dtype=torch.long, device=device))
    generator, outputs = torch.Generator("cpu").manual_seed(0), []
    for parents in _PARENTS:
        drawn = torch.randn(
            1, len(parents), len(weight), dtype=torch.float32, device="cpu", generator=generator
        )
        depths = _depths(parents)
        slot_depths = torch.tensor([depths], dtype=torch.long, device=device)
        step = TreeStep(_sees(parents).to(device), slot_depths, cache)
        cache.reserve(len(parents))
        states = drawn.to(device, weight.dtype)
        positions = cache.lengths[:, None] + slot_depths
        outputs.append(runner.run(states, positions, step=step, cache=cache))
        windows |= step.windows
        cache.append(len(parents))
        cache.keep([range(len(parents)) if parents is _PARENTS[0] else []])
    return torch.cat(outputs, dim=1).float(), windows


def _depths(parents: tuple[int, ...]) -> list[int]:
    depths: list[int] = []
    for node, parent in enumerate(parents):
        depths.append(0 if parent == node else depths[parent] + 1)
    return depths


def _sees(parents: tuple[int, ...]) -> Tensor:
    seen = torch.eye(len(parents), dtype=torch.bool, device="cpu")
    for node, parent in enumerate(parents):
        seen[node] |= seen[parent]
    return seen[None]
