"""Medusa-2: train heads together with an adapter of the base, which keeps what the base says."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from typing_extensions import override

from speclm.config import require_in_range, require_positive
from speclm.drafting.heads_folder import hub_id
from speclm.methods.medusa.checkpoint_writing import require_writable, write_medusa
from speclm.methods.medusa.network import MedusaHeads, medusa_checkpoint
from speclm.methods.medusa.proposer import MedusaProposer
from speclm.methods.medusa.training import MedusaObjective, medusa_meter, score_heads
from speclm.training.acceptance_meter import AcceptanceMeter
from speclm.training.adapter import FOLDERS, Adapter, require_output
from speclm.training.base_forward import base_logits, last_hidden, recompute_activations
from speclm.training.targets import count_shifted, next_targets, shifted_targets
from speclm.training.training_model import (
    TrainingModel,
    score_in_chunks,
    soft_cross_entropy,
)


@dataclass(frozen=True, slots=True)
class TuningObjective:
    """Settings of the loss and of the two stages.

    In the first stage only the heads are trained. In the second, the loss of the base is added, and
    its adapter is trained on both.

    Args:
        heads: Settings of the heads' loss.
        heads_weight: Weight of the heads' loss for the adapter, reached at the end of the training
            along a quarter of a sine. The heads themselves always learn from their whole loss,
            since optimisers such as Adam do not notice a factor.
        heads_warmup: Steps of the first stage; below 1 it is a share of all steps.
        distillation: Share of the divergence from the base without its adapter in the loss of the
            base; the rest is the cross-entropy of the data's tokens.
        heads_rate: Learning rate of the heads, biases included, relative to that of the adapter.
    """

    heads: MedusaObjective = field(default_factory=MedusaObjective)
    heads_weight: float = 0.2
    heads_warmup: float = 0.4
    distillation: float = 1.0
    heads_rate: float = 4.0

    def __post_init__(self) -> None:
        require_in_range("heads_weight", self.heads_weight, low=0.0, high=1e6)
        require_in_range("heads_warmup", self.heads_warmup, low=0.0, high=2**31)
        require_in_range("distillation", self.distillation, low=0.0, high=1.0)
        require_positive("heads_rate", self.heads_rate)

    def num_warmup_steps(self, num_steps: int) -> int:
        """Return the number of steps of the first stage."""
        share = self.heads_warmup * (num_steps if self.heads_warmup < 1 else 1)
        return min(round(share), num_steps)


class MedusaTuningModel(TrainingModel):
    """Computes the loss of Medusa heads and of the base under an adapter.

    The base is changed in place: with its adapter it is the target that the heads draft for, and
    the output of `SpecModel` is exact for this tuned base.

    Source: Cai et al. 2024 (Medusa), sections 2.2.2 and 2.3.2.
    """

    heads: MedusaHeads

    def __init__(
        self,
        base: PreTrainedModel,
        heads: MedusaHeads,
        adapter: Adapter,
        *,
        objective: TuningObjective | None = None,
        output: str = "adapter",
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        """Put heads on a base with an adapter; all other parameters of the base are frozen.

        Args:
            base: The target.
            heads: Heads to train, see `new_medusa_heads` and `load_medusa_heads`.
            adapter: The adapter that was put into this base.
            objective: Settings of the loss; None for the defaults.
            output: What `write` writes of the base, a key of `FOLDERS`.
            tokenizer: The base's, written next to what is written of it; None for none.

        Raises:
            UnsupportedModelError: If `base` is not a decoder-only language model.
            VocabularyMismatchError: If the heads were made for another vocabulary.
            OptionError: If the heads have another width than the base, the output is unknown, or a
                quantised base is to be merged.
        """
        require_output(base, output)
        MedusaProposer(heads, target=base)  # checks that they fit
        super().__init__(base, heads)
        for parameter in adapter.parameters.values():
            parameter.requires_grad = True
        self.adapter = nn.ParameterDict(
            {name.replace(".", "-"): parameter for name, parameter in adapter.parameters.items()}
        )
        self.objective = objective or TuningObjective()
        self.rate_factors = {"heads.": self.objective.heads_rate}
        self.output, self.tokenizer = output, tokenizer
        self._adapter = adapter
        # Modules that differ in training; all others of the base stay in eval mode.
        self._switched: list[nn.Module] = [*adapter.dropouts]
        self._step, self._num_steps = 0, 0

    def begin_step(self, step: int, num_steps: int) -> None:
        """Choose the stage of a step of the optimizer.

        Args:
            step: Its index.
            num_steps: Steps of the whole training.
        """
        self._step, self._num_steps = step, num_steps

    @property
    def adapter_weight(self) -> float | None:
        """Weight of the heads' loss for the adapter; None in the first stage of a training."""
        num_warmup = self.objective.num_warmup_steps(self._num_steps)
        if self.training and self._step < num_warmup:
            return None
        passed = (self._step + 1 - num_warmup) / max(self._num_steps - num_warmup, 1)
        return self.objective.heads_weight * math.sin(min(max(passed, 0.0), 1.0) * math.pi / 2)

    @override
    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        for module in self._switched:
            module.training = mode
        return self

    @override
    def activation_checkpointing_enable(self, **options: Any) -> None:
        base = self.view.model
        recompute_activations(base)
        # Layers recompute in training mode only. Their modules stay in eval mode.
        self._switched += [m for m in base.modules() if isinstance(m, GradientCheckpointingLayer)]

    @override
    def count_targets(self, loss_mask: Bool[Tensor, "batch seq"]) -> Float[Tensor, " parts"]:
        own = count_shifted(loss_mask, num_drafted=1, first=1)
        return torch.cat([own, count_shifted(loss_mask, num_drafted=self.heads.num_heads)])

    @override
    def new_meter(self) -> AcceptanceMeter:
        return medusa_meter(self.heads)

    @override
    def forward(
        self,
        input_ids: Int[Tensor, "batch seq"],
        attention_mask: Int[Tensor, "batch seq"],
        loss_mask: Bool[Tensor, "batch seq"],
        shares: Float[Tensor, " parts"] | None = None,
    ) -> dict[str, Any]:
        weight = self.adapter_weight
        with torch.set_grad_enabled(torch.is_grad_enabled() and weight is not None):
            hidden = last_hidden(self.view, input_ids, attention_mask)
        seen = hidden
        if weight is not None and hidden.requires_grad:
            seen = hidden.view_as(hidden)  # a node of its own, for the hook
            hooked: Any = seen
            hooked.register_hook(lambda gradient: gradient * weight)
        num_heads = self.heads.num_heads
        base_tokens = self.base_tokens(hidden.view(*input_ids.shape, -1), loss_mask)
        outputs = score_heads(
            self.heads,
            seen,
            shifted_targets(input_ids, loss_mask, num_drafted=num_heads),
            shifted_targets(base_tokens, loss_mask, num_drafted=num_heads),
            view=self.view,
            objective=self.objective.heads,
            shares=None if shares is None else shares[1:],
        )
        outputs["base_tokens"] = base_tokens
        if weight is None:
            return outputs
        before = None
        if self.objective.distillation or not self.training:
            with torch.no_grad(), self._adapter.off():
                before = last_hidden(self.view, input_ids, attention_mask)
        loss, figures = self._score_base(hidden, before, next_targets(input_ids, loss_mask))
        if shares is not None:
            loss = loss * shares[0].to(loss.device)
        total = outputs["loss"] + loss.to(outputs["loss"].device)
        return {**outputs, "loss": total, "figures": figures}

    def _score_base(
        self,
        hidden: Float[Tensor, "tokens hidden"],
        before: Float[Tensor, "tokens hidden"] | None,
        targets: Int[Tensor, "batch seq"],
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """Return the mean loss of the base, and the sums and counts of its parts.

        Args:
            hidden: The base's last hidden states.
            before: Those without the adapter; None if they are not needed.
            targets: The next token of each position.
        """
        flat = targets.flatten().to(hidden.device)
        rows = (flat >= 0).nonzero()[:, 0]
        num_logits = (2 if before is None else 4) * self.view.vocab_size
        sums, _ = score_in_chunks(
            partial(self._score_rows, hidden, before), rows, flat[rows], logits_per_row=num_logits
        )
        count = sums.new_tensor(len(rows))
        names = ("base_loss", "base_divergence", "base_loss_before")
        used = names[: 1 if before is None else 3]
        figures = {
            name: torch.stack([total.detach(), count])
            for name, total in zip(used, sums[1:], strict=False)
        }
        return sums[0] / count.clamp(min=1), figures

    def _score_rows(
        self,
        hidden: Float[Tensor, "tokens hidden"],
        before: Float[Tensor, "tokens hidden"] | None,
        rows: Int[Tensor, " rows"],
        targets: Int[Tensor, " rows"],
    ) -> tuple[Float[Tensor, "4"], Int[Tensor, " rows"]]:
        """Return sums of the loss, the cross-entropy, the divergence and the old cross-entropy."""
        share = self.objective.distillation
        logits = base_logits(self.view, hidden[rows]).float()
        tokens = F.cross_entropy(logits, targets, reduction="none")
        if before is None:
            zero = tokens.new_zeros(())
            return torch.stack([tokens.sum(), tokens.sum().detach(), zero, zero]), rows
        with torch.no_grad():
            theirs = base_logits(self.view, before[rows]).float()
            old, probs = F.cross_entropy(theirs, targets, reduction="sum"), theirs.softmax(-1)
            entropy = -torch.xlogy(probs, probs).sum(-1)
        divergence = soft_cross_entropy(logits, probs) - entropy
        losses = (1 - share) * tokens + share * divergence
        parts = [losses.sum(), tokens.sum().detach(), divergence.sum().detach(), old]
        return torch.stack(parts), rows

    @override
    def write(self, folder: Path) -> None:
        """Write the adapter or the merged base into a folder within, and then the heads."""
        require_writable(folder)
        base_id = hub_id(self.view.model.config.name_or_path)  # paths are not written
        self._adapter.write(folder, self.output, tokenizer=self.tokenizer, base_id=base_id)
        write_medusa(folder, medusa_checkpoint(self.heads, base_name_or_path=base_id))

    @override
    def closing_lines(self, folder: Path, figures: Mapping[str, float]) -> list[str]:
        lines = []
        old, new = figures.get("base_loss_before"), figures.get("base_loss")
        if old and new is not None:
            lines.append(
                f"loss of the base on the same data: {old:.4f} before, {new:.4f} after "
                f"({new / old - 1:+.1%})"
            )
        what = "merged base" if self.output == "merged" else "base with the adapter"
        part = folder / FOLDERS[self.output]
        return [*lines, f"heads are in {folder}, and draft for the {what} in {part}"]


class Stages(TrainerCallback):
    """Passes the step of a training to its model, which needs it for the stages."""

    def __init__(self, model: MedusaTuningModel) -> None:
        self._model = model

    @override
    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        self._model.begin_step(state.global_step, state.max_steps)
