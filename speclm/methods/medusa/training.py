"""Trains Medusa heads on a frozen base with Transformers' `Trainer`."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import Dataset
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments
from typing_extensions import override

from speclm.config import require_in_range
from speclm.drafting.heads_folder import hub_id
from speclm.methods.medusa.checkpoint import MedusaCheckpoint, write_medusa
from speclm.methods.medusa.loss import IGNORED, score_guesses, shifted_targets, weighted_loss
from speclm.methods.medusa.network import MedusaHeads, MedusaHeadsConfig
from speclm.methods.medusa.proposer import STATIC_TREE, MedusaProposer
from speclm.target import TargetView, output_matrix
from speclm.training.guess_meter import GuessMeter
from speclm.training.heads_trainer import HeadsTrainer, place_base
from speclm.training.rows import EvalRows, Item
from speclm.tree.static import trim_paths

MAX_LOGITS = 2**27
"""Logits that are kept for the backward pass, half a gigabyte; beyond, they are recomputed."""


@dataclass(frozen=True, slots=True)
class MedusaObjective:
    """What the heads are trained for.

    Args:
        decay: Weight of a head's loss relative to that of the head before it; later guesses are
            reached less often.
        soft_weight: Share of the loss that is taken against the base's own distribution at the
            target's position instead of the token of the data; it costs no further forward of the
            base.
    """

    decay: float = 0.8
    soft_weight: float = 0.0

    def __post_init__(self) -> None:
        require_in_range("decay", self.decay, low=0.0, high=1.0)
        require_in_range("soft_weight", self.soft_weight, low=0.0, high=1.0)


class MedusaTrainingModel(nn.Module):
    """Computes the loss of Medusa heads from one forward of the base.

    The base is frozen, put into eval mode and kept outside the module tree: parameters and state
    are those of the heads alone, and wrappers for several devices leave the base where it is.
    """

    def __init__(
        self, base: PreTrainedModel, heads: MedusaHeads, *, objective: MedusaObjective
    ) -> None:
        """Put heads on a base.

        Args:
            base: A causal language model; its parameters stop requiring gradients.
            heads: Heads of the base's width and vocabulary.
            objective: What they are trained for.

        Raises:
            UnsupportedModelError: If `base` is not a decoder-only language model.
        """
        super().__init__()
        self.view = TargetView(base)
        base.requires_grad_(requires_grad=False)
        base.train(mode=False)
        self.heads = heads
        self.objective = objective

    def forward(
        self,
        input_ids: Int[Tensor, "batch seq"],
        attention_mask: Int[Tensor, "batch seq"],
        loss_mask: Bool[Tensor, "batch seq"],
    ) -> dict[str, Tensor]:
        """Return the loss of a batch and what its figures are made of.

        Args:
            input_ids: Rows, padded on the right.
            attention_mask: 1 at tokens, 0 at padding.
            loss_mask: True at tokens that the heads are to guess.

        Returns:
            ``loss``; of each head ``loss_sums`` and ``counts``; and ``ranks``
            ``[batch, seq, heads]`` of the targets, -1 where there is none.
        """
        targets = shifted_targets(input_ids, loss_mask, num_heads=self.heads.num_heads)
        hidden = self._base_hidden(input_ids, attention_mask)
        sources = (targets != IGNORED).any(-1).flatten().nonzero()[:, 0]
        targets = targets.flatten(0, 1)
        loss_sums, found = self._score(hidden, sources, targets[sources])
        counts = (targets != IGNORED).sum(0)
        ranks = torch.full_like(targets, -1)
        ranks[sources] = found
        return {
            "loss": weighted_loss(loss_sums, counts, decay=self.objective.decay),
            "loss_sums": loss_sums.detach(),
            "counts": counts,
            "ranks": ranks.view(*input_ids.shape, -1),
        }

    @torch.no_grad()
    def _base_hidden(
        self, input_ids: Int[Tensor, "batch seq"], attention_mask: Int[Tensor, "batch seq"]
    ) -> Float[Tensor, "tokens hidden"]:
        """Return what the base's output matrix would read, without computing logits."""
        device = self.view.device
        output = self.view.decoder(
            input_ids=input_ids.to(device),
            attention_mask=attention_mask.to(device),
            use_cache=False,
        )
        hidden: Tensor = output[0]
        return hidden.flatten(0, 1)

    def _score(
        self,
        hidden: Float[Tensor, "tokens hidden"],
        sources: Int[Tensor, " rows"],
        targets: Int[Tensor, "rows heads"],
    ) -> tuple[Float[Tensor, " heads"], Int[Tensor, "rows heads"]]:
        """Return the sums of the losses and the ranks, in chunks if memory asks for it."""
        logits_per_row = targets.shape[1] * self.view.vocab_size
        size = max(1, MAX_LOGITS // logits_per_row)
        if len(sources) <= size:
            return self._score_chunk(hidden, sources, targets)
        parts = [
            checkpoint(self._score_chunk, hidden, *chunk, use_reentrant=False)
            for chunk in zip(torch.split(sources, size), torch.split(targets, size), strict=True)
        ]
        sums, ranks = zip(*parts, strict=True)
        return torch.stack(sums).sum(0), torch.cat(ranks)

    def _score_chunk(
        self,
        hidden: Float[Tensor, "tokens hidden"],
        sources: Int[Tensor, " rows"],
        targets: Int[Tensor, "rows heads"],
    ) -> tuple[Float[Tensor, " heads"], Int[Tensor, "rows heads"]]:
        device = self.heads.weight.device
        rows = hidden[sources.to(hidden.device)].to(device)
        logits = self.heads(rows, lm_head=self._lm_head)
        soft = self.objective.soft_weight
        distribution = (
            self._base_distribution(hidden, sources, targets).to(device) if soft else None
        )
        losses, ranks = score_guesses(logits, targets, soft_targets=distribution, soft_weight=soft)
        return losses.sum(0), ranks

    def _lm_head(self, states: Tensor) -> Tensor:
        # Heads are trained in float32 above a base that may be narrower, or on another device.
        view = self.view
        return view.head_logits(states.to(view.model.dtype)).to(states.device)

    @torch.no_grad()
    def _base_distribution(
        self,
        hidden: Float[Tensor, "tokens hidden"],
        sources: Int[Tensor, " rows"],
        targets: Int[Tensor, "rows heads"],
    ) -> Float[Tensor, "rows heads vocab"]:
        """Return the base's distribution of each target, from the hidden state before it."""
        ahead = 1 + torch.arange(targets.shape[1], device=sources.device)
        # Without a target there may be no such position; any does then.
        positions = (sources[:, None] + ahead).where(targets != IGNORED, sources[:, None])
        needed, where = torch.unique(positions.to(hidden.device), return_inverse=True)
        return self.view.head_logits(hidden[needed]).float().softmax(-1)[where]


def new_medusa_heads(
    base: PreTrainedModel,
    *,
    num_heads: int = 5,
    num_layers: int = 1,
    has_own_lm_head: bool = False,
    seed: int = 0,
) -> MedusaHeads:
    """Return untrained heads for a base, in float32 and on its device.

    Args:
        base: The target; it gives width and vocabulary.
        num_heads: Heads.
        num_layers: Residual layers of each.
        has_own_lm_head: Whether each head gets an output matrix of its own, which starts as a
            copy of the base's. It guesses better and is as large as the base's.
        seed: Of the random weights of all layers but the first.

    Raises:
        UnsupportedModelError: If the base's output matrix is to be copied, and is quantised or
            offloaded.
    """
    view = TargetView(base)
    config = MedusaHeadsConfig(
        hidden_size=view.hidden_size,
        vocab_size=view.vocab_size,
        num_heads=num_heads,
        num_layers=num_layers,
        has_own_lm_head=has_own_lm_head,
    )
    heads = MedusaHeads(config, dtype=torch.float32, device=view.device)
    heads.init_weights_(
        output_matrix(base) if has_own_lm_head else None,
        generator=torch.Generator().manual_seed(seed),
    )
    return heads


class MedusaTrainer(HeadsTrainer):
    """A `Trainer` whose model is Medusa heads on a frozen base.

    Logs loss and top-1, 2 and 3 accuracy of each head and ``estimated_tau``, the tokens a round
    that decoding texts like the data would have.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        heads: MedusaHeads,
        args: TrainingArguments,
        *,
        train_dataset: Dataset[Item],
        eval_dataset: EvalRows | None = None,
        objective: MedusaObjective | None = None,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        """Prepare a training.

        Args:
            base: The target. It is frozen, put into eval mode and, unless it was loaded with a
                device map, moved to the device of `args`.
            heads: Heads to train, see `new_medusa_heads`.
            args: As `training_arguments` makes them.
            train_dataset: Rows, see `load_rows`.
            eval_dataset: Rows that ``args.eval_strategy`` evaluates on, or several such by name.
            objective: What the heads are trained for; None for the defaults.
            callbacks: Callbacks next to `Trainer`'s own.

        Raises:
            VocabularyMismatchError: If the heads were made for another vocabulary.
            OptionError: If the heads have another width than the base.
            DataError: If a row has nothing to learn, or more tokens than the base was built for.
        """
        place_base(base, args)
        MedusaProposer(heads, target=base)  # checks that they fit
        # The same for all heads, whatever they will draft, so that estimates compare.
        choices = trim_paths(STATIC_TREE, max_depth=heads.num_heads)
        super().__init__(
            MedusaTrainingModel(base, heads, objective=objective or MedusaObjective()),
            args,
            make_meter=partial(GuessMeter, choices, num_guesses=heads.num_heads, name="head"),
            max_length=TargetView(base).max_positions,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            callbacks=callbacks,
        )
        self.heads = heads
        self._base_id = hub_id(base.config.name_or_path)

    @override
    def _write(self, folder: Path) -> None:
        checkpoint = MedusaCheckpoint(
            **self.heads.state_dict(),
            vocab_size=self.heads.config.vocab_size,
            base_name_or_path=self._base_id,
        )
        write_medusa(folder, checkpoint)
