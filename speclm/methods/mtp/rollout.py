"""Run MTP layers over whole texts in training, step by step as in decoding."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from speclm.attention import attached, attention_configs, tree_step
from speclm.attention.step import KernelMask
from speclm.cache import CACHE_NAME
from speclm.methods.mtp.network import MtpHeads, MtpLayer


def roll_out(
    heads: MtpHeads,
    features: Float[Tensor, "batch seq hidden"],
    tokens: Int[Tensor, "batch seq"],
    sources: Int[Tensor, "batch sources"],
    *,
    num_steps: int,
    embedding: Callable[[Tensor], Tensor],
) -> Iterator[Float[Tensor, "batch sources hidden"]]:
    """Yield the output of each step, with gradients.

    Step k of position t joins the output of step k - 1 with the embedding of token ``t + 1 + k``.
    As in decoding, a layer reads whole texts at its own step; the last one, applied to its own
    output at later steps, sees what it computed from the target up to t, and its later steps.

    Args:
        heads: The layers.
        features: The target's last hidden states.
        tokens: Texts, padded on the right, of at least two tokens.
        sources: Positions to draft from.
        num_steps: Number of steps. Near the end of a text the last steps read tokens that do not
            exist; their outputs have no meaning.
        embedding: Looks up rows of the target's embedding matrix, as they are stored.
    """
    num_positions, num_layers = tokens.shape[1] - 1, len(heads.layers)
    positions = torch.arange(num_positions, device=tokens.device)
    cache, states = DynamicCache(), features[:, :-1]
    for step in range(min(num_steps, num_layers)):
        layer, read = heads.layer(step), tokens[:, (positions + 1 + step).clamp(max=num_positions)]
        joined = layer.joined(states, heads.embed(read, step, embedding=embedding))
        is_last = step == num_layers - 1 < num_steps - 1
        states = _run(layer, joined, positions[None], cache if is_last else None)
        yield _at(states, sources)
    hidden, layer = _at(states, sources), heads.layer(num_layers)
    configs = attention_configs(layer.decoder)
    for step in range(num_layers, num_steps):
        read = tokens.gather(1, (sources + 1 + step).clamp(max=num_positions))
        joined = layer.joined(hidden, heads.embed(read, step, embedding=embedding))
        further = step + 1 - num_layers
        with attached(configs), tree_step(_RolloutStep(sources, num_positions, further)):
            hidden = _run(layer, joined, sources + further, cache)
        yield hidden


def _run(
    layer: MtpLayer,
    joined: Float[Tensor, "batch nodes hidden"],
    positions: Int[Tensor, "rows nodes"],
    cache: Cache | None,
) -> Float[Tensor, "batch nodes hidden"]:
    output: Any = layer.decoder(
        inputs_embeds=joined,
        position_ids=positions,
        use_cache=cache is not None,
        **{CACHE_NAME: cache},
    )
    states: Tensor = output.last_hidden_state
    return states


def _at(
    states: Float[Tensor, "batch positions hidden"], sources: Int[Tensor, "batch sources"]
) -> Float[Tensor, "batch sources hidden"]:
    return states.gather(1, sources[:, :, None].expand(-1, -1, states.shape[2]))


class _RolloutStep:
    """What each source sees at a step of the last layer beyond its first one.

    These are the layer's entries of whole texts up to the source, and its own later steps.
    """

    is_regular = False
    """A step of regular generation would need no mask."""

    def __init__(
        self, sources: Int[Tensor, "batch sources"], num_positions: int, further: int
    ) -> None:
        """Store where the sources are.

        Args:
            sources: Positions to draft from.
            num_positions: Entries of whole texts.
            further: Number of this step, the first one over whole texts being 0.
        """
        self.windows: set[int | None] = set()
        self._sources, self._num_positions, self._further = sources, num_positions, further

    def lazy_bias(
        self, window: int | None, dtype: torch.dtype
    ) -> Float[Tensor, "batch 1 sources kv_len"]:
        """Return the additive mask of layers with a window."""
        visible = self._visible(window)
        bias = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
        return bias.masked_fill_(~visible, torch.finfo(dtype).min)

    def kernel_mask(self, device: torch.device) -> KernelMask:
        """Raise: the kernels compute no gradients, and are not asked without a `TreeMask`."""
        raise NotImplementedError(f"training has no masks for kernels, also not on {device}")

    def repeated(self, bias: Tensor, groups: int) -> Tensor:
        """Return a mask repeated along its nodes."""
        return bias.repeat(1, 1, groups, 1)

    def _visible(self, window: int | None) -> Bool[Tensor, "batch 1 sources kv_len"]:
        sources, further = self._sources, self._further
        distance = sources[:, :, None] - torch.arange(self._num_positions, device=sources.device)
        seen = distance >= 0
        if window is not None:
            seen &= distance + further < window
        itself = torch.eye(sources.shape[1], dtype=torch.bool, device=sources.device)
        later = [
            itself if window is None or further - earlier < window else torch.zeros_like(itself)
            for earlier in range(1, further + 1)
        ]
        return torch.cat([seen, torch.cat(later, dim=1).expand(len(sources), -1, -1)], dim=2)[
            :, None
        ]
