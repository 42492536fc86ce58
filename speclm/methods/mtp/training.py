"""Train MTP layers further on what their base writes."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel
from typing_extensions import override

from speclm.config import require_count, require_in_range
from speclm.drafting.heads_folder import hub_id
from speclm.errors import OptionError, UnsupportedModelError
from speclm.methods.finding import find_heads
from speclm.methods.mtp.checkpoint_writing import saved_layers, write_mtp
from speclm.methods.mtp.method import DECAY, MAX_STEPS, NUM_STEPS
from speclm.methods.mtp.network import MtpHeads
from speclm.methods.mtp.proposer import MtpProposer
from speclm.methods.mtp.rollout import roll_out
from speclm.methods.registry import HeadsSource, registered_methods
from speclm.training.acceptance_meter import AcceptanceMeter
from speclm.training.targets import Sources, count_shifted, find_sources
from speclm.training.training_model import (
    TrainingModel,
    rank_targets,
    score_in_chunks,
    token_cross_entropy,
    weighted_loss,
)


@dataclass(frozen=True, slots=True)
class MtpObjective:
    """Settings of the loss.

    Args:
        num_steps: Draft tokens in a row that are trained from every position.
        num_measured: Draft tokens in a row that are ranked; steps beyond `num_steps` run without
            gradients.
        decay: Weight of a step's loss relative to that of the step before it.

    Source: Cai et al. 2025 (FastMTP).
    """

    num_steps: int = NUM_STEPS
    num_measured: int = 5
    decay: float = DECAY

    def __post_init__(self) -> None:
        require_count("num_steps", self.num_steps, low=1, high=MAX_STEPS)
        require_count("num_measured", self.num_measured, low=self.num_steps, high=MAX_STEPS)
        require_in_range("decay", self.decay, low=0.0, high=1.0)


class MtpTrainingModel(TrainingModel):
    """Computes the loss of MTP layers from one forward of the base.

    An embedding matrix of the layers themselves is not trained, nor are layers that only draft
    beyond the steps of the loss.
    """

    heads: MtpHeads

    def __init__(
        self, base: PreTrainedModel, heads: MtpHeads, *, objective: MtpObjective | None = None
    ) -> None:
        """Put MTP layers on a base, and freeze the base.

        Args:
            base: The target.
            heads: Result of `load_mtp_heads` for the target.
            objective: Settings of the loss; None for the defaults.

        Raises:
            UnsupportedModelError: If `base` is not a decoder-only language model, or its
                embeddings are quantised or offloaded and the layers have none of their own.
        """
        MtpProposer(heads, target=base)  # checks that they fit
        super().__init__(base, heads.train().requires_grad_(requires_grad=True))
        self.objective = objective or MtpObjective()
        for index in range(len(heads.layers)):
            layer = heads.layer(index)
            frozen: list[nn.Module | None] = [layer]
            if index < self.objective.num_steps:
                one_row = layer.decoder.get_submodule("embed_tokens")  # embeddings are given
                frozen = [one_row, layer.embed_tokens]
            for module in frozen:
                if module is not None:
                    module.requires_grad_(requires_grad=False)

    @property
    @override
    def layers_read(self) -> tuple[int, ...]:
        return (-1,)

    @override
    def count_targets(self, loss_mask: Bool[Tensor, "batch seq"]) -> Float[Tensor, " steps"]:
        return count_shifted(loss_mask, num_drafted=self.objective.num_steps)

    @override
    def new_meter(self) -> AcceptanceMeter:
        num_drafted = self.objective.num_measured
        chain = tuple((0,) * depth for depth in range(1, num_drafted + 1))
        return AcceptanceMeter(chain, num_drafted=num_drafted, name="step")

    @override
    def write(self, folder: Path) -> None:
        base_id = hub_id(self.view.model.config.name_or_path)  # paths are not written
        write_mtp(folder, saved_layers(self.heads, self.view, base_name_or_path=base_id))

    @override
    def forward(
        self,
        input_ids: Int[Tensor, "batch seq"],
        attention_mask: Int[Tensor, "batch seq"],
        loss_mask: Bool[Tensor, "batch seq"],
        shares: Float[Tensor, " parts"] | None = None,
    ) -> dict[str, Any]:
        objective, device = self.objective, self.heads.layer(0).projection.weight.device
        _, last = self.read_base(input_ids, attention_mask, (-1,))
        tokens, loss_mask = input_ids.to(device), loss_mask.to(device)
        base_tokens = self.base_tokens(last, loss_mask)
        num_measured = objective.num_measured
        sources = find_sources(tokens, loss_mask, num_steps=num_measured)
        outputs = roll_out(
            self.heads,
            last.to(device),
            tokens,
            sources.indices,
            num_steps=num_measured,
            embedding=self._embed,
        )
        sums, counts = [], []
        # Padding sources are at position 0 and have rank -1, below any real rank.
        ranks = torch.full((*tokens.shape, num_measured), -1, device=device, dtype=torch.long)
        for step in range(num_measured):
            is_trained = step < objective.num_steps
            with torch.set_grad_enabled(torch.is_grad_enabled() and is_trained):
                loss_sum, found = self._score_step(next(outputs), sources, base_tokens, step)
            ranks[:, :, step].scatter_reduce_(1, sources.indices, found, reduce="amax")
            if is_trained:
                sums.append(loss_sum)
                counts.append((sources.targets[:, :, step] >= 0).sum())
        loss_sums, counted = torch.stack(sums), torch.stack(counts)
        return {
            "loss": weighted_loss(loss_sums, counted, decay=objective.decay, shares=shares),
            "loss_sums": loss_sums.detach(),
            "counts": counted,
            "ranks": ranks,
            "base_tokens": base_tokens,
        }

    def _embed(self, tokens: Tensor) -> Tensor:
        return self.view.stored_embeddings(tokens.to(self.view.device)).to(tokens.device)

    def _score_step(
        self,
        hidden: Float[Tensor, "batch sources hidden"],
        sources: Sources,
        base_tokens: Int[Tensor, "batch seq"],
        step: int,
    ) -> tuple[Float[Tensor, ""], Int[Tensor, "batch sources"]]:
        """Return the sum of a step's losses, and the ranks of the base's tokens."""
        targets = sources.targets[:, :, step]
        is_target = targets >= 0
        drafted = (sources.indices + 2 + step).clamp(max=base_tokens.shape[1] - 1)
        loss_sum, found = score_in_chunks(
            partial(self._score, step),
            hidden[is_target],
            targets[is_target],
            base_tokens.gather(1, drafted)[is_target],
            logits_per_row=self.view.vocab_size * self.objective.num_steps,
        )
        ranks = torch.full_like(targets, -1)
        ranks[is_target] = found
        return loss_sum, ranks

    def _score(
        self,
        step: int,
        hidden: Float[Tensor, "rows hidden"],
        targets: Int[Tensor, " rows"],
        wanted: Int[Tensor, " rows"],
    ) -> tuple[Float[Tensor, ""], Int[Tensor, " rows"]]:
        logits = self.heads.logits(hidden, step, lm_head=self.lm_head).float()
        return token_cross_entropy(logits, targets, None).sum(), rank_targets(logits, wanted)


def load_mtp_heads(
    base: PreTrainedModel, heads: str | Path | None = None, *, revision: str | None = None
) -> MtpHeads:
    """Load MTP layers for training, in float32 and on the base's device.

    Args:
        base: The target.
        heads: Folder or hub id of layers that were trained here; None for those in the base's own
            files.
        revision: Branch, tag or commit of `heads` on the hub; None for the main branch.

    Raises:
        OptionError: If `heads` are not MTP layers, or the base names no files.
        CheckpointError: If there are none, or they are damaged, quantised or of another base.
        UnsupportedModelError: If layers share tensors, which would have to stay equal.
    """
    options: dict[str, Any] = {"dtype": torch.float32}
    if heads is None:
        source = HeadsSource(registered_methods()["mtp"], "mtp", options=options)
    else:
        source = find_heads(heads, options | ({} if revision is None else {"revision": revision}))
        if source.method.name != "mtp" or source.folder is None:
            raise OptionError(
                f"heads {str(heads)!r} are those of the method {source.method.name!r}, expected a "
                "folder or hub id of MTP layers as speclm train mtp writes them; name such, or "
                "leave it out to start from the base's own layers"
            )
    proposer = source.method.load(source, base)
    assert isinstance(proposer, MtpProposer)
    keys = [key for layer in proposer.heads.keys for key in layer.values()]
    shared = sorted({key for key in keys if keys.count(key) > 1})
    if shared:
        raise UnsupportedModelError(
            f"the {len(proposer.heads.layers)} MTP layers share {shared[:6]!r}, expected tensors "
            "of their own: training would make them differ; use them as they are"
        )
    return proposer.heads
