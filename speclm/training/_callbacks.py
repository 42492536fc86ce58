"""Callbacks of every training: its first lines, its progress bar, and the order of an epoch."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import has_length
from typing_extensions import override

from speclm.training.run_summary import announce_agreement

if TYPE_CHECKING:
    from speclm.training.heads_trainer import HeadsTrainer


class Announcement(TrainerCallback):
    """Says what is trained before the first step, and leaves a record for resuming."""

    def __init__(self, trainer: "HeadsTrainer") -> None:
        self._trainer = trainer

    @override
    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        trainer = self._trainer
        if trainer.is_world_process_zero():
            trainer.record().write(Path(str(trainer.args.output_dir)))
            for line in trainer.summary().lines():
                trainer.announce(line)
        if trainer.is_world_process_zero() or trainer.has_divided_base:
            agreement = trainer.agreement()
            if trainer.is_world_process_zero():
                announce_agreement(agreement, trainer.announce)


class EpochOrder(TrainerCallback):
    """Chooses the order of each epoch.

    Accelerate does so too, except in the first epoch of a resumed training of several processes.
    """

    def __init__(self) -> None:
        self.sampler: Any = None  # of the training in progress

    @override
    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(int(state.epoch))


class TauProgress(ProgressCallback):
    """One progress bar with count and time left, loss and estimated tau; evaluation shares it."""

    _num_evaluated = 0

    @override
    def on_log(self, *args: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            tau = logs.get("estimated_tau")
            estimate = "" if tau is None else f", estimated tau {tau:.2f}"
            self._show(f"loss {logs['loss']:.3f}{estimate}")

    @override
    def on_prediction_step(self, *args: Any, **kwargs: Any) -> None:
        bar: Any = self.training_bar
        if bar is None:
            super().on_prediction_step(*args, **kwargs)  # type: ignore[no-untyped-call]
            return
        batches = kwargs.get("eval_dataloader")
        self._num_evaluated += 1
        num_batches = len(batches) if has_length(batches) else "?"
        self._show(f"evaluating {self._num_evaluated}/{num_batches}")

    @override
    def on_evaluate(self, *args: Any, **kwargs: Any) -> None:
        self._num_evaluated = 0
        super().on_evaluate(*args, **kwargs)  # type: ignore[no-untyped-call]

    def _show(self, text: str) -> None:
        bar: Any = self.training_bar  # None before training and in all processes but one
        if bar is not None:
            bar.set_postfix_str(text)
