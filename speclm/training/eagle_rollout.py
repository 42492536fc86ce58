"""Runs EAGLE heads over training texts as decoding would: on the target's features, then on theirs.

At step 0 every slot reads what the target computed. At step k a slot reads what the heads gave out
at step k - 1, and the token k places on. It then sees all slots of step 0 up to its own, and of
the steps since only itself: what a path of guesses sees below the committed slots.

Source: Li et al. 2025 (EAGLE-3), training-time test.
"""

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from speclm.heads import EagleHeads


def roll_out(
    heads: EagleHeads,
    features: Float[Tensor, "batch seq features"],
    tokens: Int[Tensor, "batch seq"],
    sources: Int[Tensor, "batch sources"],
    *,
    num_steps: int,
    embedding: Callable[[Tensor], Tensor],
) -> Iterator[Float[Tensor, "batch sources hidden"]]:
    """Yield the outputs of one step after another, with gradients.

    Args:
        heads: The heads.
        features: The target's features of each token.
        tokens: Rows, padded on the right, of at least two tokens.
        sources: Slots whose outputs are wanted: slot t joins the features at t with token t + 1.
        num_steps: Steps; the last ones of slots near the end of a row read tokens that are not
            there, and mean nothing.
        embedding: Looks up rows of the target's embedding matrix, as they are stored.
    """
    batch, num_slots = tokens.shape[0], tokens.shape[1] - 1
    store = _Slots()
    slots = torch.arange(num_slots, device=tokens.device)
    hidden = heads(
        heads.fuse(features[:, :-1]),
        heads.embed(tokens[:, 1:], embedding=embedding),
        position_ids=slots.expand(batch, -1),
        past_key_values=store,
    )
    hidden = hidden.gather(1, sources[:, :, None].expand(-1, -1, hidden.shape[2]))
    yield hidden
    for step in range(1, num_steps):
        read = tokens.gather(1, (sources + 1 + step).clamp(max=num_slots))
        hidden = heads(
            hidden,
            heads.embed(read, embedding=embedding),
            position_ids=sources + step,
            attention_mask=_visible(sources, num_slots, step, heads.config.sliding_window),
            past_key_values=store,
        )
        yield hidden


class _Slots:
    """Keys and values of all steps so far, with their gradients."""

    def __init__(self) -> None:
        self._layers: dict[int, tuple[list[Tensor], list[Tensor]]] = {}

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, /) -> tuple[Tensor, Tensor]:
        """Add those of a step, and return all."""
        parts = self._layers.setdefault(layer_idx, ([], []))
        for part, new in zip(parts, (keys, values), strict=True):
            part.append(new)
        return torch.cat(parts[0], dim=2), torch.cat(parts[1], dim=2)


def _visible(
    sources: Int[Tensor, "batch sources"], num_slots: int, step: int, window: int | None
) -> Bool[Tensor, "batch 1 sources slots"]:
    """Return what each source sees at a step: slots of step 0, then its own of each step since."""
    slots = torch.arange(num_slots, device=sources.device)
    behind = sources[:, :, None] - slots  # [batch, sources, slots], at step 0
    seen = behind >= 0
    if window is not None:
        seen &= behind + step < window
    itself = torch.eye(sources.shape[1], dtype=torch.bool, device=sources.device)
    since = [
        itself if window is None or step - earlier < window else torch.zeros_like(itself)
        for earlier in range(1, step + 1)
    ]
    return torch.cat([seen, torch.cat(since, dim=1).expand(len(sources), -1, -1)], dim=2)[:, None]
