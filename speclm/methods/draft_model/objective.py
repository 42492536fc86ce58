"""Training objective of draft models: the base's distribution at the assistant's tokens."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from typing_extensions import override

from speclm.config import require_in_range, require_positive
from speclm.methods.draft_model.method import wrap_draft_model
from speclm.methods.draft_model.proposer import SharedVocabulary
from speclm.methods.draft_model.training import write_draft_model
from speclm.target import TargetView
from speclm.training.acceptance_meter import AcceptanceMeter
from speclm.training.base_forward import base_logits, last_hidden, recompute_activations
from speclm.training.targets import IGNORED, count_shifted, next_targets
from speclm.training.training_model import (
    TrainingModel,
    rank_targets,
    score_in_chunks,
    soft_cross_entropy,
    weighted_loss,
)

NUM_MEASURED = 5
"""Draft tokens of the chain whose tau is estimated."""


@dataclass(frozen=True, slots=True)
class DraftObjective:
    """Settings of the loss.

    Args:
        temperature: Divides the logits of both distributions in the divergence, which is multiplied
            by its square.
        token_weight: Share of the cross-entropy of the data's own tokens in the loss; the rest is
            the divergence.
    """

    temperature: float = 1.0
    token_weight: float = 0.0

    def __post_init__(self) -> None:
        require_positive("temperature", self.temperature)
        require_in_range("token_weight", self.token_weight, low=0.0, high=1.0)


class DraftTrainingModel(TrainingModel):
    """Computes the loss of a draft model: its divergence from the base at the assistant's tokens.

    The loss at a token is the Kullback-Leibler divergence of the draft model's distribution from
    the base's, each given the text before the token. Source: Hinton et al. 2015; for drafting, Zhou
    et al. 2024 (DistillSpec).
    """

    heads: PreTrainedModel

    def __init__(
        self,
        base: PreTrainedModel,
        draft: PreTrainedModel,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        objective: DraftObjective | None = None,
    ) -> None:
        """Put a draft model next to a base, and freeze the base.

        Args:
            base: The target.
            draft: The model to train, see `new_draft_model` and `load_draft_model`.
            tokenizer: The base's, written next to the draft model; None for none.
            objective: Settings of the loss; None for the defaults.

        Raises:
            UnsupportedModelError: If one of them cannot be used for drafting.
            VocabularyMismatchError: If they have different vocabularies.
        """
        wrap_draft_model(draft.train(mode=False), base, {})  # checks that it fits
        super().__init__(base, draft.requires_grad_(requires_grad=True))
        self.draft_view = TargetView(draft)
        self.tokenizer = tokenizer
        self.objective = objective or DraftObjective()
        self._vocabulary = SharedVocabulary.of(self.draft_view, self.view)
        self._tied = _tied_names(self)
        hooked: Any = self
        hooked.register_state_dict_post_hook(_drop_tied)
        hooked.register_load_state_dict_pre_hook(_restore_tied)

    @property
    @override
    def max_length(self) -> int | None:
        bounds = (self.view.max_positions, self.draft_view.max_positions)
        return min((bound for bound in bounds if bound is not None), default=None)

    @override
    def count_targets(self, loss_mask: Bool[Tensor, "batch seq"]) -> Float[Tensor, "1"]:
        return count_shifted(loss_mask, num_drafted=1, first=1)

    @override
    def new_meter(self) -> AcceptanceMeter:
        chain = tuple((0,) * depth for depth in range(1, NUM_MEASURED + 1))
        return AcceptanceMeter(chain, num_drafted=NUM_MEASURED, name="token", num_named=1)

    @override
    def activation_checkpointing_enable(self, **options: Any) -> None:
        recompute_activations(self.heads)

    @override
    def closing_lines(self, folder: Path, figures: Mapping[str, float]) -> list[str]:
        return [f"the draft model is in {folder}"]

    @override
    def write(self, folder: Path) -> None:
        write_draft_model(folder, self.heads, base=self.view.model, tokenizer=self.tokenizer)

    @override
    def forward(
        self,
        input_ids: Int[Tensor, "batch seq"],
        attention_mask: Int[Tensor, "batch seq"],
        loss_mask: Bool[Tensor, "batch seq"],
        shares: Float[Tensor, "1"] | None = None,
    ) -> dict[str, Any]:
        with torch.no_grad():
            wanted = last_hidden(self.view, input_ids, attention_mask)
        hidden = last_hidden(self.draft_view, self._vocabulary.readable(input_ids), attention_mask)
        device = hidden.device
        base_tokens = self.base_tokens(wanted.view(*input_ids.shape, -1), loss_mask)
        chosen = next_targets(base_tokens, loss_mask).to(device)
        targets = next_targets(input_ids, loss_mask).to(device)
        rows = (targets.flatten() >= 0).nonzero()[:, 0]
        loss_sum, found = score_in_chunks(
            partial(self._score, hidden, wanted),
            rows,
            targets.flatten()[rows],
            chosen.flatten()[rows],
            logits_per_row=4 * self.view.vocab_size,
        )
        counts = torch.full((1,), len(rows), dtype=torch.long, device=device)
        ranks = torch.full_like(targets, -1).flatten()
        ranks[rows] = found
        return {
            "loss": weighted_loss(loss_sum, counts, decay=1.0, shares=shares),
            "loss_sums": loss_sum.detach(),
            "counts": counts,
            "ranks": chain_ranks(ranks.view(targets.shape), num_drafted=NUM_MEASURED),
            "base_tokens": base_tokens,
        }

    def _score(
        self,
        hidden: Float[Tensor, "tokens draft_hidden"],
        wanted: Float[Tensor, "tokens hidden"],
        rows: Int[Tensor, " rows"],
        targets: Int[Tensor, " rows"],
        chosen: Int[Tensor, " rows"],
    ) -> tuple[Float[Tensor, "1"], Int[Tensor, " rows"]]:
        """Return the sum of the losses, and the rank of each token that the base chose."""
        heat, num_shared = self.objective.temperature, self._vocabulary.num_shared
        logits = self.draft_view.head_logits(hidden[rows]).float()[:, :num_shared]
        with torch.no_grad():
            theirs = base_logits(self.view, wanted[rows.to(wanted.device)])
            target_probs = (theirs.to(hidden.device).float()[:, :num_shared] / heat).softmax(-1)
            entropy = -torch.xlogy(target_probs, target_probs).sum(-1)
        losses = heat**2 * (soft_cross_entropy(logits / heat, target_probs) - entropy)
        if weight := self.objective.token_weight:
            known = targets.masked_fill(targets >= num_shared, IGNORED)  # one lacks the id
            tokens = F.cross_entropy(logits, known, ignore_index=IGNORED, reduction="none")
            losses = (1 - weight) * losses + weight * tokens
        is_padding = chosen >= num_shared
        ranks = rank_targets(logits, chosen.masked_fill(is_padding, IGNORED))
        ranks = ranks.masked_fill(is_padding, num_shared)
        return losses.sum()[None], ranks


def chain_ranks(
    ranks: Int[Tensor, "batch seq"], *, num_drafted: int
) -> Int[Tensor, "batch seq drafted"]:
    """Return the ranks of the tokens of the chain below each root, as `AcceptanceMeter` has them.

    Args:
        ranks: Rank of the token after each position; -1 if there is none.
        num_drafted: Tokens of a chain.

    Example:
        >>> chain_ranks(torch.tensor([[-1, 4, 0, 2, -1]]), num_drafted=2).tolist()
        [[[4, 0], [0, 2], [2, -1], [-1, -1], [-1, -1]]]
    """
    padded = F.pad(ranks, (0, num_drafted + 1), value=-1)
    return padded.unfold(1, num_drafted, 1)[:, 1 : 1 + ranks.shape[1]]


def _tied_names(model: nn.Module) -> dict[str, str]:
    """Return the other names of parameters that have several, with the first name of each."""
    first: dict[Tensor, str] = {}
    tied = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if first.setdefault(parameter, name) != name:
            tied[name] = first[parameter]
    return tied


def _drop_tied(module: DraftTrainingModel, state: dict[str, Tensor], prefix: str, _: Any) -> None:
    """Keep one of two names for the same memory, which safetensors refuses to write twice."""
    for name in module._tied:
        del state[prefix + name]


def _restore_tied(
    module: DraftTrainingModel, state: dict[str, Tensor], prefix: str, *_: Any
) -> None:
    for name, first in module._tied.items():
        if prefix + first in state:
            state[prefix + name] = state[prefix + first]
