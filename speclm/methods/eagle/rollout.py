"""Run EAGLE heads over whole texts in training, step by step as in decoding."""

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from speclm.methods.eagle.network import EagleHeads


def roll_out(
    heads: EagleHeads,
    features: Float[Tensor, "batch seq features"],
    tokens: Int[Tensor, "batch seq"],
    sources: Int[Tensor, "batch sources"],
    *,
    num_steps: int,
    embedding: Callable[[Tensor], Tensor],
) -> Iterator[Float[Tensor, "batch sources hidden"]]:
    """Yield the output of each step, with gradients.

    Args:
        heads: The heads.
        features: The base's features of each token.
        tokens: Texts, padded on the right, of at least two tokens.
        sources: Positions to draft from: position t joins the features at t with token t + 1.
        num_steps: Number of steps. Near the end of a text the last steps read tokens that do not
            exist; their outputs have no meaning.
        embedding: Looks up rows of the base's embedding matrix, as they are stored.
    """
    batch, num_positions = tokens.shape[0], tokens.shape[1] - 1
    cache = _StepCache()
    positions = torch.arange(num_positions, device=tokens.device)
    hidden = heads(
        heads.fuse(features[:, :-1]),
        heads.embed(tokens[:, 1:], embedding=embedding),
        position_ids=positions.expand(batch, -1),
        past_key_values=cache,
    )
    hidden = hidden.gather(1, sources[:, :, None].expand(-1, -1, hidden.shape[2]))
    yield hidden
    for step in range(1, num_steps):
        read = tokens.gather(1, (sources + 1 + step).clamp(max=num_positions))
        hidden = heads(
            hidden,
            heads.embed(read, embedding=embedding),
            position_ids=sources + step,
            attention_mask=_visible(sources, num_positions, step, heads.config.sliding_window),
            past_key_values=cache,
        )
        yield hidden


class _StepCache:
    """Keys and values of all steps so far, with their gradients."""

    def __init__(self) -> None:
        self._layers: dict[int, tuple[list[Tensor], list[Tensor]]] = {}

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, /) -> tuple[Tensor, Tensor]:
        """Add the keys and values of a step, and return all."""
        parts = self._layers.setdefault(layer_idx, ([], []))
        for part, new in zip(parts, (keys, values), strict=True):
            part.append(new)
        return torch.cat(parts[0], dim=2), torch.cat(parts[1], dim=2)


def _visible(
    sources: Int[Tensor, "batch sources"], num_positions: int, step: int, window: int | None
) -> Bool[Tensor, "batch 1 sources keys"]:
    """Return what each source sees at a step: positions of step 0, then itself at later steps."""
    positions = torch.arange(num_positions, device=sources.device)
    distance = sources[:, :, None] - positions  # [batch, sources, positions], at step 0
    seen = distance >= 0
    if window is not None:
        seen &= distance + step < window
    itself = torch.eye(sources.shape[1], dtype=torch.bool, device=sources.device)
    later = [
        itself if window is None or step - earlier < window else torch.zeros_like(itself)
        for earlier in range(1, step + 1)
    ]
    return torch.cat([seen, torch.cat(later, dim=1).expand(len(sources), -1, -1)], dim=2)[:, None]
