"""What the training of any heads has in common: Transformers' `Trainer` around a frozen base."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence, Sized
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import EvalLoopOutput, TrainOutput
from typing_extensions import override

from speclm.errors import CheckpointError, NumericalError
from speclm.training.checkpoints import last_complete_checkpoint, reading_checkpoint, require_state
from speclm.training.guess_meter import GuessMeter
from speclm.training.length_sampler import LengthSampler
from speclm.training.progress import TauProgress
from speclm.training.rows import EvalRows, Item, TrainingRows, collate_rows, require_trainable

_log = logging.getLogger("speclm")


class HeadsTrainer(Trainer, ABC):
    """A `Trainer` whose model is heads on a frozen base.

    Logs the figures of a `GuessMeter`, goes on from the newest complete checkpoint, and ends with
    an error when the loss is no number.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        make_meter: Callable[[], GuessMeter],
        max_length: int | None,
        train_dataset: Dataset[Item],
        eval_dataset: EvalRows | None,
        callbacks: Sequence[TrainerCallback],
    ) -> None:
        """Prepare a training.

        Args:
            model: Returns ``loss``, ``loss_sums``, ``counts`` and ``ranks``, which a meter counts.
            args: As `training_arguments` makes them.
            make_meter: Makes what counts the guesses, in training and in evaluation apart.
            max_length: Most tokens of a row; None for any number.
            train_dataset: Rows, see `load_rows`.
            eval_dataset: Rows that ``args.eval_strategy`` evaluates on, or several such by name.
            callbacks: Callbacks next to `Trainer`'s own.

        Raises:
            DataError: If a row has nothing to learn, or too many tokens.
        """
        named = eval_dataset.values() if isinstance(eval_dataset, dict) else (eval_dataset,)
        data_sets: tuple[Any, ...] = (train_dataset, *named)
        for rows in data_sets:
            if isinstance(rows, Sized):  # a stream is checked where it is made
                require_trainable(rows, max_length=max_length)
        self._meters = {is_training: make_meter() for is_training in (False, True)}
        super().__init__(
            model=model,
            args=args,
            data_collator=collate_rows,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            callbacks=list(callbacks),
        )
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(TauProgress())

    @abstractmethod
    def _write(self, folder: Path) -> None:
        """Write the heads into a folder that ``SpecModel.from_pretrained`` loads."""

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
            CheckpointError: If the checkpoint is that of other heads, or cannot be read.
        """
        if resume_from_checkpoint is True:
            found = last_complete_checkpoint(str(self.args.output_dir))
            _log.warning("resuming from %s", found or "nothing: no complete checkpoint was found")
            resume_from_checkpoint = None if found is None else str(found)
        if isinstance(resume_from_checkpoint, str):
            require_state(resume_from_checkpoint)
        return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    @override
    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        with reading_checkpoint(resume_from_checkpoint):
            try:
                super()._load_from_checkpoint(resume_from_checkpoint, model)
            except RuntimeError as error:  # PyTorch's word for tensors of another shape
                if "Error(s) in loading state_dict" not in str(error):
                    raise
                difference = " ".join(str(error).split())
                raise _other_heads(resume_from_checkpoint, difference) from error

    @override
    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with reading_checkpoint(str(checkpoint)):
            super()._load_optimizer_and_scheduler(checkpoint)

    @override
    def _load_rng_state(self, checkpoint: str | None) -> None:
        with reading_checkpoint(str(checkpoint)):
            super()._load_rng_state(checkpoint)

    @override
    def _issue_warnings_after_load(self, load_result: Any) -> None:
        differing = [*load_result.missing_keys, *load_result.unexpected_keys]
        if differing:
            raise _other_heads(str(self.args.output_dir), f"{differing[0]!r} is in one alone")

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
        return loss, None, None  # logits of all guesses would fill the memory

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
            self._write(Path(output_dir or str(self.args.output_dir)))
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Upload heads")


def _other_heads(folder: str, difference: str) -> CheckpointError:
    return CheckpointError(
        f"{folder}: the checkpoint holds other heads than those in training ({difference}); resume "
        "with the options that the training began with, or train in another folder"
    )


def place_base(base: PreTrainedModel, args: TrainingArguments) -> None:
    """Put a base where it is trained on: on one device, unless it was loaded with a device map."""
    if args.n_gpu > 1:
        _log.warning("using one of %d devices; start with torchrun to use all", args.n_gpu)
        args._n_gpu = 1  # as Trainer does where a model is spread over devices
    if getattr(base, "hf_device_map", None) is None and base.device != args.device:
        base.to(args.device)  # type: ignore[arg-type]  # Transformers' decorator
