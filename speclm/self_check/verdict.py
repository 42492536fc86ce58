"""Verdicts of the self-check, from the measurements of a check or from its failure."""

import math
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from speclm.errors import BusyError, SpeclmError
from speclm.sampling.noise import GeneratorStates
from speclm.self_check.fingerprint import changes, loop_obstacle
from speclm.target import TargetView

_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-6}  # relative to the logits' spread
_HALF_TOLERANCE = 0.1  # half precision rounds more
_EFFECT_SHARE = 0.1  # maximum error relative to the effect of the tokens before
_SMALLEST_EFFECT = {torch.float32: 5e-3, torch.float64: 1e-5}  # clearly more than rounding
_HALF_SMALLEST_EFFECT = 0.05
_MAX_NAMED = 3  # changes of a model that a reason names
_MASKED = -1e3  # some models set logits of tokens that never occur far below, or to -inf


class Verification(Enum):
    """How drafts of a target are verified; the values are words for reports."""

    TREES = "tree attention"
    CHAINS = "chains"
    """One chain per row, fed as in regular generation; rows advance together."""
    REGULAR = "regular generation"


@dataclass(frozen=True, slots=True)
class SelfCheck:
    """Verdict on a model.

    Args:
        verification: How drafts are verified.
        reason: The reason for it, and against better ones, in words for reports.
        error: Maximum difference of a logit, relative to the spread of logits, in the check of
            `verification`; for regular generation in that of trees. Infinite if the check raised.
        milliseconds: The time that finding the verdict took.
        is_cached: Whether it comes from an earlier check.
        is_lasting: Whether the verdict holds for all models of the same kind; only such verdicts
            are cached.
        is_final: Whether it excludes every way to verify drafts.
    """

    verification: Verification
    reason: str
    error: float = math.inf
    milliseconds: float = 0.0
    is_cached: bool = False
    is_lasting: bool = True
    is_final: bool = False

    @property
    def passes(self) -> bool:
        """Whether drafts may be verified at all."""
        return self.verification is not Verification.REGULAR


@dataclass(frozen=True, slots=True)
class Evidence:
    """The measurements of a check, both relative to the spread of the logits.

    Args:
        error: Maximum difference between verified logits and those of the model's own forwards;
            NaN if the latter are not numbers.
        effect: Maximum difference that another context makes in the model's own forwards.
    """

    error: float
    effect: float


def judge(
    target: TargetView, verification: Verification, measure: Callable[[TargetView], Evidence]
) -> SelfCheck:
    """Return a verdict for `verification` if it passes `measure`, else for regular generation.

    Exceptions lead to a verdict: foreign model code may fail in any way. So do draws from the
    default random generators, which are undone.
    """
    obstacle = loop_obstacle(target.model)
    if obstacle is not None:
        return SelfCheck(Verification.REGULAR, obstacle, is_final=True)
    generators = GeneratorStates(torch.device("cpu"), target.device)
    check = _judge_evidence(target, verification, measure)
    if not generators.changed():
        return check
    drawing = first_draw(target, measure)  # or another thread has drawn
    if drawing is None:
        return check
    generators.restore()
    reason = f"{drawing} draws random numbers in evaluation mode, different ones in each step"
    return SelfCheck(Verification.REGULAR, reason, is_final=True)


def _judge_evidence(
    target: TargetView, verification: Verification, measure: Callable[[TargetView], Evidence]
) -> SelfCheck:
    noun = "tree" if verification is Verification.TREES else "chain"
    try:
        evidence = measure(target)
    except SpeclmError as refusal:  # written for users
        is_busy = isinstance(refusal, BusyError)  # another thread generates
        return SelfCheck(Verification.REGULAR, str(refusal), is_lasting=not is_busy)
    except Exception as failure:  # noqa: BLE001
        return SelfCheck(
            Verification.REGULAR,
            f"{noun} forward failed with {type(failure).__name__}: {failure}{_due_to(target)}",
            is_lasting=_is_repeatable(failure, target.device),
        )
    error, dtype = evidence.error, target.model.dtype
    bound = min(_TOLERANCE.get(dtype, _HALF_TOLERANCE), _EFFECT_SHARE * evidence.effect)
    if math.isnan(error) or not math.isfinite(evidence.effect):
        reason = "the model's own logits are not numbers, so there is nothing to compare"
        if dtype is torch.float16:
            reason += "; if numbers beyond 65504 are the cause, load it with dtype=torch.bfloat16"
        return SelfCheck(Verification.REGULAR, reason, error, is_lasting=False)
    if evidence.effect < _SMALLEST_EFFECT.get(dtype, _HALF_SMALLEST_EFFECT):
        reason = (  # caused by the weights, which other models do not share
            f"the tokens before change the model's logits by {evidence.effect:.1e} of their "
            f"spread, too little for the {noun} self-check to detect an error"
        )
        return SelfCheck(Verification.REGULAR, reason, error, is_lasting=False)
    if error > bound:
        reason = (
            f"{noun} logits differ from the model's own by {error:.1e} of their spread, at most "
            f"{bound:.0e} expected{_due_to(target)}"
        )
        return SelfCheck(Verification.REGULAR, reason, error)
    return SelfCheck(verification, f"{noun} self-check passed, {error:.1e}", error)


def _due_to(target: TargetView) -> str:
    """Return changes of the model, which may be the cause, as an addition to a reason."""
    found = changes(target.model)
    return f"; {', '.join(found[:_MAX_NAMED])}" if found else ""


def relative_difference(
    found: Float[Tensor, "positions vocab"], wanted: Float[Tensor, "positions vocab"]
) -> float:
    """Return the maximum difference of a logit over the standard deviation at its position.

    Returns:
        Infinity if only one of the two has a number somewhere; NaN if `wanted` has none to compare
        with.
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
    """Return fixed token ids, as distinct as the vocabulary allows; draws no random numbers.

    Ids with a special meaning, such as padding or an image, are left out if there are others.
    """
    vocab_size = target.vocab_size
    special = _special_ids(target.model.config.to_dict())
    stride = max(vocab_size * 5 // 13, 1)
    while math.gcd(stride, vocab_size) > 1:  # or the same few ids would repeat
        stride += 1
    ids: list[int] = []
    for step in range(num_tokens + len(special)):
        token = (3 + stride * step) % vocab_size
        if len(ids) < num_tokens and (token not in special or vocab_size <= len(special)):
            ids.append(token)
    ids *= -(-num_tokens // len(ids))  # a small vocabulary repeats its ids
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
    """Return whether an exception is due to the model, not to the machine or the moment."""
    if isinstance(failure, MemoryError | OSError | torch.OutOfMemoryError):
        return False
    if isinstance(failure, RuntimeError) and not isinstance(failure, NotImplementedError):
        words = str(failure).lower()
        return device.type == "cpu" and "memory" not in words and "alloc" not in words
    return True


def first_draw(target: TargetView, run: Callable[[TargetView], object]) -> str | None:
    """Return the module that first draws from a default random generator, in words.

    Args:
        target: A model.
        run: Runs forwards of it.

    Returns:
        A module of the model, or the model itself; None if this thread draws nothing.
    """
    found = _FirstDraw(target.device)
    with found, suppress(Exception):  # of foreign model code
        run(target)
    if found.draws:
        for name, module in target.model.named_modules():
            if module is found.module and name:
                return f"module {name!r}"
        return "the model"
    return None


class _FirstDraw(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Record the running module when this thread first draws random numbers."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.draws = False
        self.module: nn.Module | None = None
        self._device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.draws or torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **(kwargs or {}))
        # Attention has the tag too, and draws only with dropout.
        before = GeneratorStates(torch.device("cpu"), self._device)
        result = func(*args, **(kwargs or {}))
        if before.changed():
            self.draws, self.module = True, _running_module()
        return result


def _running_module() -> nn.Module | None:
    """Return the innermost module that has a method on the stack."""
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        module = frame.f_locals.get("self")
        if isinstance(module, nn.Module):
            return module
    return None
