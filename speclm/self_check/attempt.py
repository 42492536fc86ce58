"""From what a check measures, or the way it fails, to a verdict."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from speclm.errors import BusyError, SpeclmError
from speclm.sampling.noise import GeneratorStates
from speclm.self_check.changes import changes, loop_obstacle
from speclm.self_check.drawing import first_draw
from speclm.self_check.verdict import Backend, SelfCheck
from speclm.target import TargetView

_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-6}  # of the logits' spread; halves round more
_HALF_TOLERANCE = 0.1
_EFFECT_SHARE = 0.1  # an error is small next to what the tokens before do
_SMALLEST_EFFECT = {torch.float32: 5e-3, torch.float64: 1e-5}  # to be told from rounding
_HALF_SMALLEST_EFFECT = 0.05
_MAX_NAMED = 3  # changes of a model in a reason
_MASKED = -1e3  # some models write logits far below, or -inf, for tokens that never come


@dataclass(frozen=True, slots=True)
class Evidence:
    """What a check has measured; both numbers are relative to the spread of the logits.

    Args:
        error: Largest difference between what was verified and the model's own forwards; NaN
            where those are no numbers.
        effect: What another context changes in the model's own forwards.
    """

    error: float
    effect: float


def attempt(
    target: TargetView, backend: Backend, measure: Callable[[TargetView], Evidence]
) -> SelfCheck:
    """Return whether `backend` passes `measure`; regular generation when it does not.

    Exceptions are part of the verdict: foreign model code may fail in any way. So are draws from
    the default random generators, which are undone.
    """
    obstacle = loop_obstacle(target.model)
    if obstacle is not None:
        return SelfCheck(Backend.PLAIN, obstacle, is_final=True)
    generators = GeneratorStates(torch.device("cpu"), target.device)
    check = _attempt(target, backend, measure)
    if not generators.changed():
        return check
    drawing = first_draw(target, measure)  # or another thread has drawn
    if drawing is None:
        return check
    generators.restore()
    reason = f"{drawing} draws random numbers in evaluation mode, where each step draws its own"
    return SelfCheck(Backend.PLAIN, reason, is_final=True)


def _attempt(
    target: TargetView, backend: Backend, measure: Callable[[TargetView], Evidence]
) -> SelfCheck:
    noun = "tree" if backend is Backend.TREES else "chain"
    try:
        evidence = measure(target)
    except SpeclmError as refusal:  # written for users
        is_busy = isinstance(refusal, BusyError)  # another thread generates
        return SelfCheck(Backend.PLAIN, str(refusal), is_lasting=not is_busy)
    except Exception as failure:  # noqa: BLE001
        return SelfCheck(
            Backend.PLAIN,
            f"{noun} forward failed with {type(failure).__name__}: {failure}{_due_to(target)}",
            is_lasting=_is_repeatable(failure, target.device),
        )
    error, dtype = evidence.error, target.model.dtype
    bound = min(_TOLERANCE.get(dtype, _HALF_TOLERANCE), _EFFECT_SHARE * evidence.effect)
    if math.isnan(error) or not math.isfinite(evidence.effect):
        reason = "the model's own logits are not numbers, which leaves nothing to compare"
        if dtype is torch.float16:
            reason += "; if numbers beyond 65504 are why, load it with dtype=torch.bfloat16"
        return SelfCheck(Backend.PLAIN, reason, error, is_lasting=False)
    if evidence.effect < _SMALLEST_EFFECT.get(dtype, _HALF_SMALLEST_EFFECT):
        reason = (  # due to the weights, which other models do not share
            f"the tokens before change the model's logits by {evidence.effect:.1e} of their "
            f"spread, too little for the {noun} self-check to notice a wrong one"
        )
        return SelfCheck(Backend.PLAIN, reason, error, is_lasting=False)
    if error > bound:
        reason = (
            f"{noun} logits differ from the model's own by {error:.1e} of their spread, at most "
            f"{bound:.0e} expected{_due_to(target)}"
        )
        return SelfCheck(Backend.PLAIN, reason, error)
    return SelfCheck(backend, f"{noun} self-check passed, {error:.1e}", error)


def _due_to(target: TargetView) -> str:
    """Return an addition to a reason that names what may be the cause in the model itself."""
    found = changes(target.model)
    return f"; {', '.join(found[:_MAX_NAMED])}" if found else ""


def relative_difference(
    found: Float[Tensor, "positions vocab"], wanted: Float[Tensor, "positions vocab"]
) -> float:
    """Return the largest difference of a logit over the standard deviation at its position.

    Returns:
        Infinity where `found` has a number that `wanted` has not, or the reverse; NaN when
        `wanted` has none to compare with.
    """
    found, wanted = found.float(), wanted.float()
    if bool((wanted.amin(1) > _MASKED).all()):  # the usual case, in few passes; false for NaN
        difference = float(((found - wanted).abs().amax(1) / wanted.std(1, correction=0)).max())
        return math.inf if math.isnan(difference) and bool(found.isnan().any()) else difference
    is_compared = wanted > _MASKED  # false for NaN
    if not bool(is_compared.any(1).all()) or bool(wanted.isnan().any()):
        return math.nan
    is_alike = torch.where(is_compared, found.isfinite(), ~(found > _MASKED))
    if not bool(is_alike.all()):
        return math.inf
    numbers = is_compared.sum(1, keepdim=True)
    kept = wanted.masked_fill(~is_compared, 0.0)
    mean = kept.sum(1, keepdim=True) / numbers
    deviations = (kept - mean).masked_fill(~is_compared, 0.0)
    spread = (deviations.square().sum(1) / numbers[:, 0]).sqrt()
    differences = (found - wanted).masked_fill(~is_compared, 0.0).abs().amax(1)
    return float((differences / spread).max())


def distinct_tokens(target: TargetView, num_tokens: int) -> Int[Tensor, " tokens"]:
    """Return fixed token ids, as distinct as the vocabulary allows; no generator is touched.

    Ids with a meaning of their own, such as that of padding or of an image, are left out where
    there are others.
    """
    vocab_size = target.vocab_size
    special = _special_ids(target.model.config.to_dict())
    stride = max(vocab_size * 5 // 13, 1)
    while math.gcd(stride, vocab_size) > 1:  # else a few ids would come again and again
        stride += 1
    ids: list[int] = []
    for step in range(num_tokens + len(special)):
        token = (3 + stride * step) % vocab_size
        if len(ids) < num_tokens and (token not in special or vocab_size <= len(special)):
            ids.append(token)
    ids *= -(-num_tokens // len(ids))  # enough ids that are not special, in any vocabulary
    return torch.tensor(ids[:num_tokens], device=target.device, dtype=torch.long)


def _special_ids(config: Mapping[Any, object]) -> set[int]:
    found: set[int] = set()
    for name, value in config.items():
        if isinstance(value, dict):
            found |= _special_ids(value)
        elif str(name).endswith(("token_id", "token_index")):
            ids = value if isinstance(value, list) else [value]
            found |= {token for token in ids if isinstance(token, int)}
    return found


def _is_repeatable(failure: Exception, device: torch.device) -> bool:
    """Whether an exception is about the model, and not about the machine or the moment."""
    if isinstance(failure, MemoryError | OSError | torch.OutOfMemoryError):
        return False
    if isinstance(failure, RuntimeError) and not isinstance(failure, NotImplementedError):
        words = str(failure).lower()
        return device.type == "cpu" and "memory" not in words and "alloc" not in words
    return True
