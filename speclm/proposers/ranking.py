"""Ranks draft candidates by the chance that the target will choose them, given its noise."""

import torch
from jaxtyping import Float
from torch import Tensor

COUPLED_WEIGHT = 0.75
"""Share of the noise-aware law in the mixture."""

_SHARPNESS = 1.1
"""Exponent of draft probabilities and of noise in the noise-aware law."""


def rank_log_probs(
    logits: Float[Tensor, "batch nodes vocab"],
    *,
    temperature: float,
    noise: Float[Tensor, "batch vocab"] | None,
) -> Float[Tensor, "batch nodes vocab"]:
    """Return log-probabilities by which candidates are ranked and scored.

    Greedy decoding ranks by the draft's own law q. A sampling target takes
    ``argmax(target_probs / E)`` with noise E that is known already, so the draft's best guess is
    ``argmax(q / E)`` where q resembles the target, and ``argmax(q)`` where the target is nearly
    certain. The mixture of both laws is close to the better one in either case.

    Args:
        logits: The draft's logits.
        temperature: The target's; ignored when greedy.
        noise: Exponential noise of the position that is decided; None when greedy.

    Source: Daliri, Musco, Suresh 2024 (coupling without communication by shared noise).
    """
    if noise is None:
        return logits.float().log_softmax(-1)
    log_q = (logits.float() / temperature).log_softmax(-1)
    coupled = (_SHARPNESS * (log_q - noise.log()[:, None, :])).softmax(-1)
    return torch.lerp(log_q.exp(), coupled, COUPLED_WEIGHT).log()
