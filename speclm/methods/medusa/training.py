"""Train Medusa heads: their objective, and new heads to start from."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel
from typing_extensions import override

from speclm.config import require_in_range
from speclm.drafting.heads_folder import hub_id
from speclm.errors import OptionError
from speclm.methods.finding import find_heads
from speclm.methods.medusa.checkpoint_writing import write_medusa
from speclm.methods.medusa.network import MedusaHeads, MedusaHeadsConfig, medusa_checkpoint
from speclm.methods.medusa.proposer import STATIC_TREE, MedusaProposer
from speclm.target import TargetView, output_matrix
from speclm.training.acceptance_meter import AcceptanceMeter
from speclm.training.base_forward import base_logits
from speclm.training.targets import IGNORED, count_shifted, shifted_targets
from speclm.training.training_model import (
    TrainingModel,
    rank_targets,
    score_in_chunks,
    soft_cross_entropy,
    weighted_loss,
)
from speclm.tree.static import trim_paths


@dataclass(frozen=True, slots=True)
class MedusaObjective:
    """Settings of the loss.

    Args:
        decay: Weight of a head's loss relative to that of the head before it; rounds reach later
            draft tokens less often.
        soft_weight: Share of the loss against the base's own distribution instead of the token of
            the data; it costs no further forward of the base.
    """

    decay: float = 0.8
    soft_weight: float = 0.0

    def __post_init__(self) -> None:
        require_in_range("decay", self.decay, low=0.0, high=1.0)
        require_in_range("soft_weight", self.soft_weight, low=0.0, high=1.0)


class MedusaTrainingModel(TrainingModel):
    """Computes the loss of Medusa heads from one forward of the base."""

    heads: MedusaHeads

    def __init__(
        self, base: PreTrainedModel, heads: MedusaHeads, *, objective: MedusaObjective | None = None
    ) -> None:
        """Put heads on a base, and freeze the base.

        Args:
            base: The target.
            heads: Heads to train, see `new_medusa_heads`.
            objective: Settings of the loss; None for the defaults.

        Raises:
            UnsupportedModelError: If `base` is not a decoder-only language model.
            VocabularyMismatchError: If the heads were made for another vocabulary.
            OptionError: If the heads have another width than the base.
        """
        MedusaProposer(heads, target=base)  # checks that they fit
        super().__init__(base, heads)
        self.objective = objective or MedusaObjective()

    @property
    @override
    def layers_read(self) -> tuple[int, ...]:
        return (-1,)

    @override
    def count_targets(self, loss_mask: Bool[Tensor, "batch seq"]) -> Float[Tensor, " heads"]:
        return count_shifted(loss_mask, num_drafted=self.heads.num_heads)

    @override
    def new_meter(self) -> AcceptanceMeter:
        return medusa_meter(self.heads)

    @override
    def write(self, folder: Path) -> None:
        base_id = hub_id(self.view.model.config.name_or_path)  # paths are not written
        write_medusa(folder, medusa_checkpoint(self.heads, base_name_or_path=base_id))

    @override
    def forward(
        self,
        input_ids: Int[Tensor, "batch seq"],
        attention_mask: Int[Tensor, "batch seq"],
        loss_mask: Bool[Tensor, "batch seq"],
        shares: Float[Tensor, " heads"] | None = None,
    ) -> dict[str, Any]:
        _, last = self.read_base(input_ids, attention_mask, (-1,))
        base_tokens = self.base_tokens(last, loss_mask)
        outputs = score_heads(
            self.heads,
            last.flatten(0, 1),
            shifted_targets(input_ids, loss_mask, num_drafted=self.heads.num_heads),
            shifted_targets(base_tokens, loss_mask, num_drafted=self.heads.num_heads),
            view=self.view,
            objective=self.objective,
            shares=shares,
        )
        return {**outputs, "base_tokens": base_tokens}


def medusa_meter(heads: MedusaHeads) -> AcceptanceMeter:
    """Return a meter with the same tree for any number of heads, to compare their estimates."""
    choices = trim_paths(STATIC_TREE, max_depth=heads.num_heads)
    return AcceptanceMeter(choices, num_drafted=heads.num_heads, name="head")


def score_heads(
    heads: MedusaHeads,
    hidden: Float[Tensor, "tokens hidden"],
    targets: Int[Tensor, "batch seq heads"],
    wanted: Int[Tensor, "batch seq heads"],
    *,
    view: TargetView,
    objective: MedusaObjective,
    shares: Float[Tensor, " heads"] | None = None,
) -> dict[str, Any]:
    """Return the loss of heads from the base's hidden states; see `TrainingModel.forward`.

    Args:
        heads: The heads.
        hidden: Hidden states of all positions, see `TrainingModel.read_base`.
        targets: Result of `shifted_targets` for the texts.
        wanted: The same for the base's own tokens.
        view: The base.
        objective: Settings of the loss.
        shares: As in `TrainingModel.forward`.
    """
    sources = (targets != IGNORED).any(-1).flatten().nonzero()[:, 0]
    flat = targets.flatten(0, 1)
    loss_sums, source_ranks = score_in_chunks(
        partial(_score, heads, view, objective, hidden),
        sources,
        flat[sources],
        wanted.flatten(0, 1)[sources],
        logits_per_row=flat.shape[1] * view.vocab_size,
    )
    counts = (flat != IGNORED).sum(0)
    ranks = torch.full_like(flat, -1)
    ranks[sources] = source_ranks
    return {
        "loss": weighted_loss(loss_sums, counts, decay=objective.decay, shares=shares),
        "loss_sums": loss_sums.detach(),
        "counts": counts,
        "ranks": ranks.view(targets.shape),
    }


def _score(
    heads: MedusaHeads,
    view: TargetView,
    objective: MedusaObjective,
    hidden: Float[Tensor, "tokens hidden"],
    sources: Int[Tensor, " rows"],
    targets: Int[Tensor, "rows heads"],
    wanted: Int[Tensor, "rows heads"],
) -> tuple[Float[Tensor, " heads"], Int[Tensor, "rows heads"]]:
    """Return the sum of the losses of each head, and the rank of each token of the base.

    Args:
        heads: The heads.
        view: The base.
        objective: Settings of the loss.
        hidden: Hidden states of all positions.
        sources: Positions to draft from.
        targets: Tokens to learn there.
        wanted: Tokens that the base would write there.
    """
    device = heads.weight.device
    rows = hidden[sources.to(hidden.device)].to(device)
    logits = heads(rows, lm_head=partial(base_logits, view)).float()
    losses = F.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none"
    ).view_as(targets)
    if soft_weight := objective.soft_weight:
        target_probs = _base_probs(view, hidden, sources, targets).to(device)
        soft = soft_cross_entropy(logits, target_probs).masked_fill(targets == IGNORED, 0.0)
        losses = (1 - soft_weight) * losses + soft_weight * soft
    return losses.sum(0), rank_targets(logits, wanted)


@torch.no_grad()
def _base_probs(
    view: TargetView,
    hidden: Float[Tensor, "tokens hidden"],
    sources: Int[Tensor, " rows"],
    targets: Int[Tensor, "rows heads"],
) -> Float[Tensor, "rows heads vocab"]:
    """Return the base's distribution at each target, from the hidden state before it."""
    ahead = 1 + torch.arange(targets.shape[1], device=sources.device)
    # Without a target the position may not exist; any other position will do.
    positions = (sources[:, None] + ahead).where(targets != IGNORED, sources[:, None])
    needed, indices = torch.unique(positions.to(hidden.device), return_inverse=True)
    return view.head_logits(hidden[needed]).float().softmax(-1)[indices]


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
        base: The target; it decides width and vocabulary.
        num_heads: Draft tokens ahead.
        num_layers: Residual layers of each head.
        has_own_lm_head: Whether each head gets an output matrix of its own, which starts as a
            copy of the base's and is as large. Such heads draft better.
        seed: Seed of the random weights of all layers but the first.

    Raises:
        UnsupportedModelError: If the base's output matrix has to be copied and is quantised or
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


def load_medusa_heads(
    base: PreTrainedModel, heads: str | Path, *, revision: str | None = None
) -> MedusaHeads:
    """Load saved heads for further training, in float32 and on the base's device.

    They may be in any layout that `read_medusa` reads. They keep their sizes, but copies
    of the base's output matrix are left out. A static tree that was stored with them is not kept.

    Args:
        base: The target.
        heads: Folder or hub id.
        revision: Branch, tag or commit on the hub; None for the main branch.

    Raises:
        OptionError: If they are not Medusa heads, have another width than the base, or are part
            of another model.
        VocabularyMismatchError: If they were made for another vocabulary.
        CheckpointError: If they are damaged or incomplete.
    """
    options: dict[str, Any] = {} if revision is None else {"revision": revision}
    source = find_heads(heads, options)
    if source.method.name != "medusa":
        raise OptionError(
            f"heads {str(heads)!r} are those of the method {source.method.name!r}, expected Medusa "
            "heads; name a folder or hub id of such"
        )
    source = replace(source, options={"dtype": torch.float32})
    proposer = source.method.load(source, base)
    assert isinstance(proposer, MedusaProposer)
    return proposer.heads.requires_grad_(requires_grad=True)
