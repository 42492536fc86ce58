"""The model that is trained: heads on a frozen base, and parts that their losses share."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from speclm.target import TargetFeatures, TargetView
from speclm.target.features import FeatureTap
from speclm.training.acceptance_meter import AcceptanceMeter

IGNORED = -100
"""Marks a missing target: the token is beyond the text or not the assistant's."""

MAX_LOGITS = 2**27
"""Maximum logits kept for the backward pass, half a gigabyte; more are recomputed."""


class TrainingModel(nn.Module, ABC):
    """Computes the loss of heads from one forward of a frozen base.

    The base is put into eval mode and kept outside the module tree, so parameters and state are
    those of the heads only, and wrappers for several devices do not touch the base.
    """

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

    @abstractmethod
    def forward(
        self,
        input_ids: Int[Tensor, "batch seq"],
        attention_mask: Int[Tensor, "batch seq"],
        loss_mask: Bool[Tensor, "batch seq"],
    ) -> dict[str, Tensor]:
        """Return the loss of a batch and the numbers that an `AcceptanceMeter` adds up.

        Args:
            input_ids: Texts, padded on the right.
            attention_mask: 1 at tokens, 0 at padding.
            loss_mask: True at tokens that the heads learn to draft.

        Returns:
            ``loss``, and ``loss_sums``, ``counts``, ``ranks`` and ``base_tokens`` as
            `AcceptanceMeter.add` takes them; where they differ from the batch's or exist, also
            ``loss_mask`` and ``tree_lengths``.
        """

    @abstractmethod
    def new_meter(self) -> AcceptanceMeter:
        """Return a meter for the draft tokens of these heads."""

    @abstractmethod
    def write(self, folder: Path) -> None:
        """Write the heads into a folder that ``SpecModel.from_pretrained`` loads."""

    @property
    def max_length(self) -> int | None:
        """Maximum tokens of an example; None for any number."""
        return self.view.max_positions

    @torch.no_grad()
    def read_base(
        self,
        input_ids: Int[Tensor, "batch seq"],
        attention_mask: Int[Tensor, "batch seq"],
        layers: tuple[int, ...],
    ) -> tuple[Float[Tensor, "batch seq features"], Float[Tensor, "batch seq hidden"]]:
        """Return hidden states of the base on its device, and the input of its output matrix.

        Args:
            input_ids: Texts, padded on the right.
            attention_mask: 1 at tokens, 0 at padding.
            layers: The hidden states wanted, joined in this order, see `TargetFeatures`.
        """
        device = self.view.device
        taken: list[Tensor] = []
        wanted = layers if layers == (-1,) else (*layers, -1)
        tap = FeatureTap(TargetFeatures(wanted), is_own=lambda: True, take=taken.append)
        with tap.on(self.view.decoder, self.view.num_layers):
            self.view.decoder(
                input_ids=input_ids.to(device),
                attention_mask=attention_mask.to(device),
                use_cache=False,
            )
        (states,) = taken
        last = states[..., -(states.shape[-1] // len(wanted)) :]
        return last if wanted == (-1,) else states[..., : -last.shape[-1]], last

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
        view = self.view
        return view.head_logits(states.to(view.device, view.model.dtype)).to(states.device)


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


def shifted_targets(
    tokens: Int[Tensor, "batch seq"], loss_mask: Bool[Tensor, "batch seq"], *, num_drafted: int
) -> Int[Tensor, "batch seq drafted"]:
    """Return the tokens to draft from each position.

    From the hidden state at position t the target itself predicts token t + 1. Draft token i is
    token ``t + 2 + i``. The mask moves with the token: a target counts if its token is the
    assistant's.

    Args:
        tokens: Texts, padded on the right.
        loss_mask: True at tokens that count.
        num_drafted: Draft tokens at each position.

    Returns:
        Targets, `IGNORED` if none counts.

    Example:
        >>> tokens = torch.tensor([[5, 6, 7, 8]])
        >>> mask = torch.tensor([[False, False, True, True]])
        >>> shifted_targets(tokens, mask, num_drafted=2).tolist()
        [[[7, 8], [8, -100], [-100, -100], [-100, -100]]]
    """
    counted = tokens.masked_fill(~loss_mask, IGNORED)
    padded = F.pad(counted, (0, num_drafted + 1), value=IGNORED)
    return padded.unfold(1, num_drafted, 1)[:, 2:]  # window t + 2 holds the targets of t


def place_after(
    chosen: Int[Tensor, " positions"],
    positions: Int[Tensor, " positions"],
    loss_mask: Bool[Tensor, "batch seq"],
) -> Int[Tensor, "batch seq"]:
    """Return tokens that were chosen after some positions, each at the position after it.

    Args:
        chosen: The token after each position.
        positions: Indices into the flattened batch.
        loss_mask: True at tokens that count.

    Returns:
        The tokens; `IGNORED` where nothing was chosen or counts, and at the start of each text.

    Example:
        >>> mask = torch.tensor([[True, True, False, True]])
        >>> place_after(torch.tensor([7, 8, 9]), torch.tensor([0, 1, 2]), mask).tolist()
        [[-100, 7, -100, 9]]
    """
    placed = chosen.new_full((loss_mask.numel() + 1,), IGNORED)
    placed[positions + 1] = chosen
    tokens = placed[:-1].view_as(loss_mask).to(loss_mask.device).masked_fill(~loss_mask, IGNORED)
    tokens[:, 0] = IGNORED  # what follows the text before it
    return tokens


def until_first_difference(
    base_tokens: Int[Tensor, "*rows drafted"], tokens: Int[Tensor, "*rows drafted"]
) -> Int[Tensor, "*rows drafted"]:
    """Return the tokens of the base up to the first that differs from the text's.

    What the base would write after that is unknown: its later tokens continue another text.

    Example:
        >>> until_first_difference(torch.tensor([5, 6, 7, 8]), torch.tensor([5, 6, 9, 8])).tolist()
        [5, 6, 7, -100]
    """
    agrees = F.pad(base_tokens == tokens, (1, 0), value=True)[..., :-1]
    return base_tokens.masked_fill(~agrees.cumprod(-1).bool(), IGNORED)


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
    return (logits > own).sum(-1).masked_fill(targets < 0, -1)


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
    loss_sums: Float[Tensor, " drafted"], counts: Int[Tensor, " drafted"], *, decay: float
) -> Float[Tensor, ""]:
    """Return the sum over draft tokens of ``decay ** i`` times the mean loss of draft token i.

    Args:
        loss_sums: Sum of the losses of each draft token.
        counts: Number of its targets; a draft token without targets adds nothing.
        decay: Weight of a draft token relative to the one before it.
    """
    means = loss_sums / counts.clamp(min=1)
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
