"""The model that is trained: heads on a frozen base, and parts that their losses share."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from speclm.errors import OptionError, UnknownNameError
from speclm.target import TargetFeatures, TargetView
from speclm.training.acceptance_meter import AcceptanceMeter
from speclm.training.base_forward import base_logits, run_decoder
from speclm.training.targets import IGNORED, place_after

MAX_LOGITS = 2**27
"""Maximum logits kept for the backward pass, half a gigabyte; more are recomputed."""


class TrainingModel(nn.Module, ABC):
    """Computes the loss of heads from one forward of a frozen base.

    The base is put into eval mode and kept outside the module tree, so parameters and state are
    those of the heads only, and wrappers for several devices do not touch the base.

    Attributes:
        rate_factors: Factors of the learning rate, by the beginning of a parameter's name; 1 for
            all others.
    """

    accepts_loss_kwargs = True
    """Shows `Trainer` that losses are scaled here if `count_targets` counts."""

    def __init__(self, base: PreTrainedModel, heads: nn.Module) -> None:
        """Freeze the base.

        Args:
            base: A causal language model; its parameters stop requiring gradients.
            heads: Heads to train.

        Raises:
            UnsupportedModelError: If `base` is not a decoder-only language model.
        """
        super().__init__()
        self.view = TargetView(base)
        base.requires_grad_(requires_grad=False)
        base.train(mode=False)
        self.heads = heads
        self.rate_factors: Mapping[str, float] = {}
        self._given: Tensor | None = None

    @abstractmethod
    def forward(
        self,
        input_ids: Int[Tensor, "batch seq"],
        attention_mask: Int[Tensor, "batch seq"],
        loss_mask: Bool[Tensor, "batch seq"],
        shares: Float[Tensor, " parts"] | None = None,
    ) -> dict[str, Any]:
        """Return the loss of a batch and the numbers that an `AcceptanceMeter` adds up.

        Args:
            input_ids: Texts, padded on the right.
            attention_mask: 1 at tokens, 0 at padding.
            loss_mask: True at tokens that the heads learn to draft.
            shares: Factor of the mean loss of each part of `count_targets`: the share of the
                optimizer step's targets that this batch has. None for 1. The losses of a step's
                batches then add up to that of one large batch.

        Returns:
            ``loss``, and ``loss_sums``, ``counts``, ``ranks`` and ``base_tokens`` as
            `AcceptanceMeter.add` takes them; where they differ from the batch's or exist, also
            ``loss_mask`` and ``tree_lengths``. ``figures`` may hold further ones to log: sum and
            count by name.
        """

    @abstractmethod
    def new_meter(self) -> AcceptanceMeter:
        """Return a meter for the draft tokens of these heads."""

    @abstractmethod
    def write(self, folder: Path) -> None:
        """Write the heads into a folder that ``SpecModel.from_pretrained`` loads."""

    def count_targets(self, loss_mask: Bool[Tensor, "batch seq"]) -> Float[Tensor, " parts"] | None:
        """Return how many targets a batch has for each part of the loss that has its own mean.

        None if that is not known; the losses of accumulated batches are then averaged, whatever
        their numbers of targets.
        """
        del loss_mask
        return None

    def closing_lines(self, folder: Path, figures: Mapping[str, float]) -> list[str]:
        """Return what the command line prints at the end of a training.

        Args:
            folder: Where the heads were written.
            figures: Last figures by name, of the evaluation data if there are any.
        """
        del figures
        return [f"heads are in {folder}"]

    def activation_checkpointing_enable(self, **options: Any) -> None:
        """Recompute activations in the backward pass, as ``gradient_checkpointing`` requests.

        Raises:
            OptionError: If there is nothing to save, because the base is frozen.
        """
        del options
        raise OptionError(
            "gradient_checkpointing is true, expected false for heads on a frozen base: no "
            "activations of the base are kept, and large logits are recomputed anyway; leave it out"
        )

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        """Do the same; its name in older versions of Transformers."""
        self.activation_checkpointing_enable(**options)

    @property
    def max_length(self) -> int | None:
        """Maximum tokens of an example; None for any number."""
        return self.view.max_positions

    @property
    def layers_read(self) -> tuple[int, ...] | None:
        """Hidden states that `read_base` is asked for, -1 last; None if the decoder does more."""
        return None

    @torch.no_grad()
    def read_base(
        self,
        input_ids: Int[Tensor, "batch seq"],
        attention_mask: Int[Tensor, "batch seq"],
        layers: tuple[int, ...],
    ) -> tuple[Float[Tensor, "batch seq features"], Float[Tensor, "batch seq hidden"]]:
        """Return hidden states of the base on its device, and the input of its output matrix.

        The base does not run inside `given_states`.

        Args:
            input_ids: Texts, padded on the right.
            attention_mask: 1 at tokens, 0 at padding.
            layers: The hidden states wanted, joined in this order, see `TargetFeatures`.
        """
        wanted = layers if layers == (-1,) else (*layers, -1)
        if self._given is None:
            states = self.run_base(input_ids, attention_mask, wanted)
        else:
            known = TargetFeatures(self.layers_read or ())
            states = known.select(self._given.to(self.view.device), TargetFeatures(wanted))
        last = states[..., -(states.shape[-1] // len(wanted)) :]
        return last if wanted == (-1,) else states[..., : -last.shape[-1]], last

    def run_base(
        self,
        input_ids: Int[Tensor, "batch seq"],
        attention_mask: Int[Tensor, "batch seq"],
        layers: tuple[int, ...],
    ) -> Float[Tensor, "batch seq features"]:
        """Run the decoder of the base; see `run_decoder`."""
        return run_decoder(self.view, input_ids, attention_mask, layers)

    @contextmanager
    def given_states(self, states: Float[Tensor, "batch seq features"] | None) -> Iterator[None]:
        """Inside the block, `read_base` returns these hidden states of `layers_read`.

        Args:
            states: Those of the batch, see `FeatureCache.collate`; None to run the base.
        """
        self._given = states
        try:
            yield
        finally:
            self._given = None

    @torch.no_grad()
    def base_goals(
        self,
        last: Float[Tensor, "batch seq hidden"],
        positions: Int[Tensor, "batch rows drafted"],
        loss_mask: Bool[Tensor, "batch seq"],
        *,
        columns: Int[Tensor, " draft_vocab"] | None,
    ) -> tuple[Float[Tensor, "positions draft_vocab"], "BaseGoals"]:
        """Return what the base says after some positions.

        Args:
            last: Input of the base's output matrix, see `read_base`.
            positions: Positions before the targets; those beyond a text count as its last.
            loss_mask: True at tokens that count.
            columns: Draft vocabulary, see `rank_columns`.

        Returns:
            The base's logits over the draft vocabulary, in float32, and the rest.
        """
        length, device = last.shape[1], positions.device
        rows = torch.arange(len(last), device=device)[:, None, None]
        needed, indices = torch.unique(
            positions.clamp(max=length - 1) + rows * length, return_inverse=True
        )
        hidden = last.flatten(0, 1)[needed.to(last.device)]
        logits = self.view.head_logits(hidden).float().to(device)
        chosen = logits.argmax(-1)
        is_draftable = logits.new_ones(len(logits))
        if columns is not None:
            is_draftable = torch.isin(chosen, columns).float()
            logits = logits[:, columns]
        base_tokens = place_after(chosen, needed, loss_mask)
        return logits, BaseGoals(hidden, is_draftable, indices, chosen, base_tokens)

    @torch.no_grad()
    def base_tokens(
        self, last: Float[Tensor, "batch seq hidden"], loss_mask: Bool[Tensor, "batch seq"]
    ) -> Int[Tensor, "batch seq"]:
        """Return the token that the base itself would write, at each position that counts.

        Args:
            last: Input of the base's output matrix, see `read_base`.
            loss_mask: True at tokens that count.

        Returns:
            The base's most likely token after the text before the position; `IGNORED` where no
            token counts and at the start of a text. On the device of `loss_mask`.
        """
        rows, before = loss_mask[:, 1:].nonzero(as_tuple=True)
        needed = (rows * loss_mask.shape[1] + before).to(last.device)
        size = max(1, MAX_LOGITS // self.view.vocab_size)
        states = last.flatten(0, 1)[needed]
        chosen = [
            self.view.head_logits(part).float().argmax(-1) for part in torch.split(states, size)
        ]
        return place_after(torch.cat(chosen), needed, loss_mask)

    def lm_head(self, states: Tensor) -> Tensor:
        """Return the base's logits for hidden states that may have another dtype or device."""
        return base_logits(self.view, states)


def tokenizer_of(base: PreTrainedModel) -> PreTrainedTokenizerBase:
    """Load the tokenizer that a base was saved with.

    Raises:
        UnknownNameError: If it has none.
    """
    name = base.config.name_or_path
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UnknownNameError(
            f"base {name!r} has no tokenizer that can be loaded ({error}), expected one to write "
            "next to the weights; save it into the base's folder"
        ) from error
    return tokenizer


@dataclass(frozen=True, slots=True, eq=False)
class BaseGoals:
    """The base's results at the positions before the targets.

    Args:
        hidden: Its last hidden states.
        is_draftable: 1 if the base's most likely token is in the draft vocabulary, else 0.
        indices: Index of the position for each target.
        chosen: The most likely token itself.
        base_tokens: The same tokens in the texts, see `TrainingModel.base_tokens`.
    """

    hidden: Float[Tensor, "positions hidden"]
    is_draftable: Float[Tensor, " positions"]
    indices: Int[Tensor, "batch rows drafted"]
    chosen: Int[Tensor, " positions"]
    base_tokens: Int[Tensor, "batch seq"]


def soft_cross_entropy(
    logits: Float[Tensor, "*rows vocab"], target_probs: Float[Tensor, "*rows vocab"]
) -> Float[Tensor, "*rows"]:
    """Return the cross-entropy of logits against a distribution, in float32."""
    logits = logits.float()
    return logits.logsumexp(-1) - (target_probs * logits).sum(-1)


def token_cross_entropy(
    logits: Float[Tensor, "rows draft_vocab"],
    targets: Int[Tensor, " rows"],
    columns: Int[Tensor, " draft_vocab"] | None,
) -> Float[Tensor, " rows"]:
    """Return the cross-entropy of each target, 0 for one outside the draft vocabulary."""
    if columns is None:
        return F.cross_entropy(logits, targets, reduction="none")
    found = torch.searchsorted(columns, targets).clamp(max=len(columns) - 1)
    found = found.masked_fill(columns[found] != targets, IGNORED)
    return F.cross_entropy(logits, found, ignore_index=IGNORED, reduction="none")


@torch.no_grad()
def rank_targets(
    logits: Float[Tensor, "*rows vocab"], targets: Int[Tensor, "*rows"]
) -> Int[Tensor, "*rows"]:
    """Return the rank of each target: 0 for the largest logit, -1 if there is no target."""
    own = logits.gather(-1, targets.clamp(min=0)[..., None])
    # On a CPU a sum of float32 takes an eighth of that of booleans; it is exact up to 2**24.
    is_larger = torch.gt(logits, own, out=torch.empty_like(logits, dtype=torch.float32))
    return is_larger.sum(-1).long().masked_fill(targets < 0, -1)


def rank_columns(
    logits: Float[Tensor, "rows draft_vocab"],
    targets: Int[Tensor, " rows"],
    columns: Int[Tensor, " draft_vocab"] | None,
) -> Int[Tensor, " rows"]:
    """Return the rank of each target; a target outside the draft vocabulary ranks last.

    Args:
        logits: Logits of the heads.
        targets: Token ids of the base; negative if there is none.
        columns: Token id of each column, increasing; None if the vocabularies are the same.

    Returns:
        0 for the largest logit, the number of columns for a token outside the draft vocabulary,
        and -1 if there is no target.
    """
    if columns is None:
        return rank_targets(logits, targets)
    indices = torch.searchsorted(columns, targets.clamp(min=0)).clamp(max=len(columns) - 1)
    is_outside = (columns[indices] != targets) & (targets >= 0)
    ranks = rank_targets(logits, indices.where(targets >= 0, targets))
    return ranks.masked_fill(is_outside, logits.shape[-1])


def weighted_loss(
    loss_sums: Float[Tensor, " drafted"],
    counts: Int[Tensor, " drafted"],
    *,
    decay: float,
    shares: Float[Tensor, " drafted"] | None = None,
) -> Float[Tensor, ""]:
    """Return the sum over draft tokens of ``decay ** i`` times the mean loss of draft token i.

    Args:
        loss_sums: Sum of the losses of each draft token.
        counts: Number of its targets; a draft token without targets adds nothing.
        decay: Weight of a draft token relative to the one before it.
        shares: Further factors, see `TrainingModel.forward`; None for 1.
    """
    means = loss_sums / counts.clamp(min=1)
    if shares is not None:
        means = means * shares.to(means.device)
    weights = decay ** torch.arange(len(means), device=means.device)
    return (weights * means).sum()


def score_in_chunks(
    score: Callable[..., tuple[Tensor, Tensor]], *rows: Tensor, logits_per_row: int
) -> tuple[Tensor, Tensor]:
    """Score rows at once, or in chunks whose logits the backward pass recomputes.

    Args:
        score: Takes rows and returns the sum of their losses and the ranks of their targets.
        *rows: Arguments of `score`, of equal lengths.
        logits_per_row: Number of logits that it computes per row.
    """
    size = max(1, MAX_LOGITS // logits_per_row)
    if len(rows[0]) <= size:
        return score(*rows)
    chunks = zip(*(torch.split(part, size) for part in rows), strict=True)
    scored = [checkpoint(score, *chunk, use_reentrant=False) for chunk in chunks]
    loss_sums, ranks = zip(*scored, strict=True)
    return torch.stack(loss_sums).sum(0), torch.cat(ranks)


def split_groups_(
    optimizer: torch.optim.Optimizer, factors: Mapping[str, float], model: nn.Module
) -> None:
    """Give parameters learning rates of their own, in groups that take the other options along.

    Args:
        optimizer: A new one, changed in place.
        factors: See `TrainingModel.rate_factors`.
        model: Its parameters are those of the optimizer.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups, optimizer.param_groups = optimizer.param_groups, []
    for group in groups:
        by_factor: dict[float, list[Tensor]] = {}
        for parameter in group["params"]:
            name = names[parameter]
            fitting = (factor for start, factor in factors.items() if name.startswith(start))
            by_factor.setdefault(next(fitting, 1.0), []).append(parameter)
        for factor, parameters in by_factor.items():
            changed = {**group, "params": parameters, "lr": group["lr"] * factor}
            optimizer.add_param_group(changed)
