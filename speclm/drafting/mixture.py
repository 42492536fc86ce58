"""The distribution that ranks candidates under sampling, and the estimator of its parameters."""

import math
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import astuple, dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from speclm.config import require_in_range
from speclm.devices import upload
from speclm.errors import OptionError

NUM_LEVELS = 4
"""Depths with parameters of their own; deeper ones share the last."""

ROUNDS_PER_UPDATE = 32
"""Observed rounds after which the parameters are updated, with a sync."""

THINNING = 4
"""After many rounds only one in so many is observed, because parameters change slowly."""

_EARLY_ROUNDS = 256

_WEIGHT_BOUNDS = (0.02, 0.98)
_EXPONENT_BOUNDS = (0.25, 4.0)
_PRIOR_DEVIATIONS = (1.5, 0.3, 0.3, 0.3)  # of the first depth from the start values
_LEVEL_DEVIATIONS = (0.75, 0.15, 0.15, 0.15)  # of each further depth from the one before
_MEMORY = 3000.0  # observations after which an old one has a third of its weight
_MAX_STEP = 0.5  # of one update; the linear model is not valid further out
_MAX_SETTINGS = 8
_MAX_PENDING = 1 << 16  # log-probabilities not summed yet: 16 rows of 4096 tokens
_LEAST_LOG_PROB = -20.0  # rarer tokens count as this rare, so that none outweighs all others
_MAX_GRADIENT = 8.0


@dataclass(frozen=True, slots=True)
class Mixture:
    """Parameters of the distribution ``w softmax(a log q - b log E) + (1 - w) softmax(a0 log q)``.

    The target takes the token with the largest ``target_probs / E``, where E is the noise. The
    first part predicts it if the draft's distribution q resembles the target's, the second if
    the target is so certain that the noise does not matter.

    Args:
        weight: w, the share of the part that uses the noise.
        draft_exponent: a, which sharpens the draft's distribution in that part.
        noise_exponent: b, which sharpens the noise.
        plain_exponent: a0, which sharpens the draft's distribution in the other part.

    Raises:
        OptionError: If a number is out of range.
    """

    weight: float = 0.75
    draft_exponent: float = 1.1
    noise_exponent: float = 1.1
    plain_exponent: float = 1.0

    def __post_init__(self) -> None:
        require_in_range("weight", self.weight, low=0.0, high=1.0)
        for name in ("draft_exponent", "noise_exponent", "plain_exponent"):
            require_in_range(name, getattr(self, name), low=0.01, high=100.0)


def require_mixture(mixture: object) -> None:
    """Check a proposer's option `mixture`.

    Raises:
        OptionError: If it is neither None nor a `Mixture`.
    """
    if mixture is not None and not isinstance(mixture, Mixture):
        raise OptionError(
            f"mixture is {mixture!r}, a {type(mixture).__name__}, expected a Mixture of "
            "fixed parameters, or None to estimate them; it is in speclm.drafting.mixture"
        )


def mixture_scores(
    log_probs: Float[Tensor, "rows vocab"],
    noise: Float[Tensor, "rows vocab"],
    tokens: Int[Tensor, " rows"],
    parameters: Float[Tensor, "rows 4"],
) -> tuple[Float[Tensor, "rows 4"], Float[Tensor, "rows 4 4"]]:
    """Return the gradient of each chosen token's log-likelihood, and the Fisher information.

    Both are with respect to the logit of the weight and the logarithms of the exponents, in the
    order of the fields of `Mixture`.

    Args:
        log_probs: The draft's distribution at the target's temperature, clamped from below.
        noise: Noise of the positions.
        tokens: Tokens that the target chose.
        parameters: The mixture of each row.
    """
    weight, a, b, plain_exponent = parameters[:, :, None].unbind(1)  # [rows, 1] each
    log_q, log_noise = log_probs.clamp(min=_LEAST_LOG_PROB), noise.log()
    coupled = (a * log_q - b * log_noise).softmax(-1)
    plain = (plain_exponent * log_q).softmax(-1)
    distribution = torch.lerp(plain, coupled, weight).clamp(min=torch.finfo(torch.float32).tiny)
    # Posterior probability of the first part if this token were chosen.
    share = weight * coupled / distribution
    from_coupled = a * (log_q - _row_sums(coupled * log_q))
    from_noise = b * (_row_sums(coupled * log_noise) - log_noise)
    from_plain = plain_exponent * (log_q - _row_sums(plain * log_q))
    by_token = torch.stack(
        [share - weight, share * from_coupled, share * from_noise, (1 - share) * from_plain], dim=1
    )  # [rows, 4, vocab]
    information = (by_token * distribution[:, None]) @ by_token.transpose(1, 2)
    chosen = tokens[:, None, None].expand(-1, 4, 1)
    return by_token.gather(2, chosen)[:, :, 0].clamp(-_MAX_GRADIENT, _MAX_GRADIENT), information


def _row_sums(values: Float[Tensor, "rows vocab"]) -> Float[Tensor, "rows 1"]:
    return values.sum(1, keepdim=True)


class MixtureEstimator:
    """Estimates the mixture under which the tokens that the target chose are most likely.

    This is a maximum a posteriori estimate. The prior of the first depth is centred on the start
    values, and that of each further depth on the depth before it. Observations add their gradient
    and information to a quadratic model of the log-likelihood; older ones fade. Every setting (a
    key) has its own parameters. Nothing is random.

    Observations are summed on their device, which is read once in `ROUNDS_PER_UPDATE` rounds.
    After the first rounds only every `THINNING`-th is observed.
    """

    def __init__(self, *, start: Mixture | None = None, is_fixed: bool = False) -> None:
        """Start at a mixture.

        Args:
            start: Parameters before anything is observed; None for the default ones.
            is_fixed: Whether to keep the start parameters.
        """
        self.start = Mixture() if start is None else start
        self.is_fixed = is_fixed
        self._states: OrderedDict[Hashable, _Estimate] = OrderedDict()
        self._state = _Estimate.at(self.start)

    def begin(self, setting: Hashable) -> None:
        """Switch to the parameters of a setting; the least recent of many settings is dropped."""
        self._state.sum_up()
        if setting not in self._states:
            self._states[setting] = _Estimate.at(self.start)
        self._states.move_to_end(setting)
        self._state = self._states[setting]
        while len(self._states) > _MAX_SETTINGS:
            self._states.popitem(last=False)

    def at(self, depth: int) -> Mixture:
        """Return the mixture for children of nodes at `depth`."""
        return self._state.mixtures[min(depth, NUM_LEVELS - 1)]

    def wants_round(self) -> bool:
        """Count a round, and return whether it should be observed."""
        if self.is_fixed:
            return False
        self._state.num_rounds += 1
        return self._state.num_rounds <= _EARLY_ROUNDS or self._state.num_rounds % THINNING == 0

    def observe(
        self,
        log_probs: Float[Tensor, "rows vocab"],
        noise: Float[Tensor, "rows vocab"],
        tokens: Int[Tensor, " rows"],
        *,
        depth: int,
    ) -> None:
        """Add the tokens that the target chose after nodes of one depth.

        Args:
            log_probs: The draft's distribution after each node.
            noise: Noise of the positions that were decided.
            tokens: Tokens that the target chose; -1 if the draft's vocabulary lacks them.
            depth: Depth of the nodes.
        """
        level = min(depth, NUM_LEVELS - 1)
        self._state.pending.append(_Observations(log_probs, noise, tokens, level))
        if sum(rows.log_probs.numel() for rows in self._state.pending) >= _MAX_PENDING:
            self._state.sum_up()

    def end_round(self) -> None:
        """End an observed round; update the parameters, with a sync, if it is time."""
        state = self._state
        state.num_observed += 1
        if state.num_observed % ROUNDS_PER_UPDATE == 0:
            state.sum_up()
            state.learn(self.start)


@dataclass(frozen=True, slots=True, eq=False)
class _Observations:
    """Observations that are not summed yet."""

    log_probs: Float[Tensor, "rows vocab"]
    noise: Float[Tensor, "rows vocab"]
    tokens: Int[Tensor, " rows"]
    level: int


@dataclass(slots=True, eq=False)
class _Estimate:
    """Estimate for one setting: a quadratic model of the log-likelihood for each level.

    Args:
        mixtures: Parameters in use.
        curvature: Matrix of the model.
        pull: Curvature times the location of the maximum.
        pending: Observations that are not in the sums yet.
        sums: Sums of gradients, information and counts, at the parameters in use.
        num_rounds: Rounds so far.
        num_observed: Rounds that were observed.
    """

    mixtures: list[Mixture]
    curvature: Float[Tensor, "levels 4 4"]
    pull: Float[Tensor, "levels 4"]
    pending: list[_Observations] = field(default_factory=list)
    sums: Float[Tensor, "levels 21"] | None = None
    num_rounds: int = 0
    num_observed: int = 0

    @classmethod
    def at(cls, mixture: Mixture) -> "_Estimate":
        return cls(
            [mixture] * NUM_LEVELS,
            curvature=torch.zeros(NUM_LEVELS, 4, 4, dtype=torch.float64, device="cpu"),
            pull=torch.zeros(NUM_LEVELS, 4, dtype=torch.float64, device="cpu"),
        )

    def sum_up(self) -> None:
        """Reduce pending observations to sums, on their device."""
        if not self.pending:
            return
        parts = [(rows.log_probs, rows.noise, rows.tokens) for rows in self.pending]
        log_probs, noise, tokens = (torch.cat(part) for part in zip(*parts, strict=True))
        device = log_probs.device
        level_of_rows = [rows.level for rows in self.pending for _ in range(len(rows.tokens))]
        levels = upload(level_of_rows, device)
        self.pending = []
        parameters = torch.tensor(
            [astuple(mixture) for mixture in self.mixtures], device=device, dtype=torch.float32
        )
        gradients, information = mixture_scores(
            log_probs, noise, tokens.clamp(min=0), parameters[levels]
        )
        # A token that the draft lacks, or has cut, is no evidence about the others.
        chosen = log_probs.gather(1, tokens.clamp(min=0)[:, None])
        found = torch.cat([gradients, information.flatten(1), torch.ones_like(chosen)], dim=1)
        # Nor is a distribution that overflowed; it would leave NaN in the sums.
        is_known = (tokens >= 0)[:, None] & ~chosen.isinf() & found.isfinite().all(1, keepdim=True)
        if self.sums is None:
            self.sums = torch.zeros(NUM_LEVELS, found.shape[1], device=device, dtype=torch.float32)
        self.sums = self.sums.to(device).index_add(0, levels, found.where(is_known, 0.0))

    def learn(self, start: Mixture) -> None:
        """Add the sums to the model and move to its maximum; syncs with the device."""
        if self.sums is None:
            return
        sums, self.sums = self.sums.double().cpu(), None
        middle = _to_free(start)
        for level in range(NUM_LEVELS):
            here = _to_free(self.mixtures[level])
            gradient, fresh, count = sums[level, :4], sums[level, 4:20].view(4, 4), sums[level, 20]
            memory = math.exp(-float(count) / _MEMORY)
            self.curvature[level] = memory * self.curvature[level] + fresh
            self.pull[level] = memory * self.pull[level] + fresh @ here + gradient
            deviations = _LEVEL_DEVIATIONS if level else _PRIOR_DEVIATIONS
            prior = torch.tensor(deviations, dtype=torch.float64, device="cpu").pow(-2)
            best = torch.linalg.solve(
                self.curvature[level] + prior.diag(), self.pull[level] + prior * middle
            )
            self.mixtures[level] = _from_free(here + (best - here).clamp(-_MAX_STEP, _MAX_STEP))
            middle = _to_free(self.mixtures[level])


def _to_free(mixture: Mixture) -> Float[Tensor, " 4"]:
    """Return the logit of the weight and the logarithms of the exponents, within their bounds."""
    weight, *exponents = astuple(mixture)
    low, high = _WEIGHT_BOUNDS
    weight = min(max(weight, low), high)
    exponents = [min(max(value, _EXPONENT_BOUNDS[0]), _EXPONENT_BOUNDS[1]) for value in exponents]
    free = [math.log(weight / (1 - weight)), *map(math.log, exponents)]
    return torch.tensor(free, dtype=torch.float64, device="cpu")


def _from_free(free: Float[Tensor, " 4"]) -> Mixture:
    odds, *exponents = free.tolist()
    low, high = _EXPONENT_BOUNDS
    weight = min(max(1 / (1 + math.exp(-odds)), _WEIGHT_BOUNDS[0]), _WEIGHT_BOUNDS[1])
    return Mixture(weight, *(min(max(math.exp(value), low), high) for value in exponents))
