"""Trains Medusa heads on a frozen base with Transformers' `Trainer`."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import EvalLoopOutput, TrainOutput
from typing_extensions import override

from speclm.errors import NumericalError
from speclm.formats import MedusaCheckpoint, write_medusa
from speclm.heads import MedusaHeads, MedusaHeadsConfig
from speclm.proposers.medusa import STATIC_TREE, MedusaProposer
from speclm.target import TargetView
from speclm.training._progress import TauProgress
from speclm.training.checkpoints import last_complete_checkpoint
from speclm.training.length_sampler import LengthSampler
from speclm.training.medusa_meter import MedusaMeter
from speclm.training.medusa_model import MedusaObjective, MedusaTrainingModel
from speclm.training.rows import Item, TrainingRows, collate_rows
from speclm.tree.choices import trim_choices

_log = logging.getLogger("speclm")


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
    """
    view = TargetView(base)
    config = MedusaHeadsConfig(
        hidden_size=view.hidden_size,
        vocab_size=view.vocab_size,
        num_heads=num_heads,
        num_layers=num_layers,
        has_own_lm_head=has_own_lm_head,
    )
    heads = MedusaHeads(config, dtype=torch.float32, device=base.device)
    output: Any = base.get_output_embeddings()  # type: ignore[no-untyped-call]  # Transformers' own
    heads.init_weights_(output.weight, generator=torch.Generator().manual_seed(seed))
    return heads


class MedusaTrainer(Trainer):
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
        eval_dataset: Dataset[Item] | None = None,
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
            eval_dataset: Rows that ``args.eval_strategy`` evaluates on.
            objective: What the heads are trained for; None for the defaults.
            callbacks: Callbacks beside `Trainer`'s own.

        Raises:
            VocabularyMismatchError: If the heads were made for another vocabulary.
            OptionError: If the heads have another width than the base.
        """
        if args.n_gpu > 1:
            _log.warning("using one of %d devices; start with torchrun to use all", args.n_gpu)
            args._n_gpu = 1  # as Trainer does where a model is spread over devices
        if getattr(base, "hf_device_map", None) is None and base.device != args.device:
            base.to(args.device)  # type: ignore[arg-type]  # Transformers' decorator
        MedusaProposer(heads, target=base)  # checks that they fit
        # The same for all heads, whatever they will draft, so that estimates compare.
        choices = trim_choices(STATIC_TREE, max_depth=heads.num_heads)
        self._meters = {
            is_training: MedusaMeter(choices, num_heads=heads.num_heads)
            for is_training in (True, False)
        }
        super().__init__(
            model=MedusaTrainingModel(base, heads, objective=objective or MedusaObjective()),
            args=args,
            data_collator=collate_rows,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            callbacks=list(callbacks),
        )
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(TauProgress())
        self.heads = heads
        self._base_name = base.config.name_or_path or None

    @override
    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train.

        Args:
            resume_from_checkpoint: Folder of a checkpoint; True for the newest complete one in the
                output folder, or a new start where there is none.
            trial: As in `Trainer`.
            ignore_keys_for_eval: As in `Trainer`.

        Raises:
            NumericalError: If the loss is not a number.
        """
        if resume_from_checkpoint is True:
            found = last_complete_checkpoint(str(self.args.output_dir))
            _log.warning("resuming from %s", found or "nothing: no complete checkpoint was found")
            resume_from_checkpoint = None if found is None else str(found)
        return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    @override
    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        outputs = model(**inputs)
        loss: Tensor = outputs["loss"]
        if not loss.isfinite():  # Trainer looks at the loss of every step too
            raise NumericalError(
                f"loss of step {self.state.global_step + 1} is {loss.item()}, expected a finite "
                "number; lower the learning rate, or train in float32 or bf16 instead of fp16"
            )
        self._meters[model.training].add(
            **{name: outputs[name] for name in ("loss_sums", "counts", "ranks")},
            loss_mask=inputs["loss_mask"],
        )
        return (loss, outputs) if return_outputs else loss

    @override
    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        with torch.no_grad(), self.compute_loss_context_manager():
            loss: Tensor = self.compute_loss(model, self._prepare_inputs(inputs))
        return loss, None, None  # logits of all heads would fill the memory

    @override
    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        self._drain(is_training=False)  # what an interrupted evaluation left
        output = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        figures = self._drain(is_training=False)
        named = {f"{prefix}_{name}": value for name, value in figures.items()}
        return output._replace(metrics={**(output.metrics or {}), **named})

    @override
    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs = {**logs, **self._drain(is_training=True)}
        super().log(logs, start_time)

    @override
    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        rows: Any = self.train_dataset if train_dataset is None else train_dataset
        # Transformers' own sampler draws an epoch from the global generator, which a resumed
        # training finds in another state.
        if self.args.train_sampling_strategy != "group_by_length":
            sampler: Sampler[int] | None = super()._get_train_sampler(rows)
            return sampler
        if isinstance(rows, TrainingRows):
            lengths = rows.lengths
        else:
            lengths = [len(rows[index]["input_ids"]) for index in range(len(rows))]
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return LengthSampler(lengths, batch_size=self.args.train_batch_size, seed=seed)

    def _drain(self, *, is_training: bool) -> dict[str, float]:
        def add_processes(sums: Tensor) -> Tensor:
            total: Tensor = self.accelerator.reduce(sums.to(self.args.device), reduction="sum")
            return total

        return self._meters[is_training].drain(add_processes)

    @override
    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the heads, in a folder that ``SpecModel.from_pretrained`` loads.

        Args:
            output_dir: The folder; None for that of the training arguments.
            _internal_call: Whether `Trainer` calls; with a folder of its own that is a checkpoint,
                which holds what training goes on from instead.

        Raises:
            CheckpointError: If what was read back is not what was written.
        """
        if _internal_call and output_dir is not None:
            super().save_model(output_dir, _internal_call)
            return
        if self.args.should_save:
            checkpoint = MedusaCheckpoint(
                **self.heads.state_dict(),
                vocab_size=self.heads.config.vocab_size,
                base_name_or_path=self._base_name,
            )
            write_medusa(output_dir or str(self.args.output_dir), checkpoint)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Upload heads")
