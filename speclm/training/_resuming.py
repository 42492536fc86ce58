"""How a training resumes: what is read from a checkpoint, and whether anything is left to do."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import ceil
from pathlib import Path
from typing import Any

from torch import nn
from transformers import EarlyStoppingCallback, Trainer, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from typing_extensions import override

from speclm.errors import CheckpointError
from speclm.training.checkpoints import other_heads, reading_checkpoint


class ResumingTrainer(Trainer):
    """A `Trainer` whose errors name a checkpoint that cannot be read; a base of trainers of heads.

    A training that early stopping has ended stays ended, unless the patience is now larger.
    """

    announce: Callable[[str], None]
    _initial_global_step: int

    @property
    def has_new_steps(self) -> bool:
        """Whether the last call of `train` made a step: none if the training had ended before."""
        return self.state.global_step > self._initial_global_step

    @override
    def _init_training_state(
        self, max_steps: int, num_update_steps_per_epoch: int, num_train_epochs: int, *rest: Any
    ) -> tuple[int, int]:
        wanted = [callback.early_stopping_patience for callback in self._early_stopping()]
        with _whole_intervals(self.args, max_steps), _without_paths_of_checkpoints():
            begun = super()._init_training_state(
                max_steps, num_update_steps_per_epoch, num_train_epochs, *rest
            )
        if rest[0] is not None:
            self._find_best_checkpoint(Path(rest[0]).parent)
        for callback, patience in zip(self._early_stopping(), wanted, strict=True):
            callback.early_stopping_patience = patience  # Trainer restores that of the checkpoint
            count = callback.early_stopping_patience_counter
            if count >= patience:
                if self.is_world_process_zero():
                    self.announce(
                        f"the training had ended at step {self.state.global_step}, after {count} "
                        f"evaluations without a better {self.args.metric_for_best_model}; for more "
                        f"steps, resume with a patience (--patience) above {count}"
                    )
                return num_train_epochs, 0  # as if all epochs were done
        return begun

    def _find_best_checkpoint(self, folder: Path) -> None:
        """Look for the best checkpoint in the folder that is resumed, wherever it was before."""
        if self.state.best_global_step:
            best = folder / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
            if self.args.load_best_model_at_end and not best.is_dir():
                raise CheckpointError(
                    f"{best} is missing, expected the best checkpoint so far; put it back or train "
                    "in another folder"
                )
            self.state.best_model_checkpoint = str(best) if best.is_dir() else None

    def _early_stopping(self) -> list[EarlyStoppingCallback]:
        callbacks = self.callback_handler.callbacks
        return [callback for callback in callbacks if isinstance(callback, EarlyStoppingCallback)]

    @override
    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        with reading_checkpoint(resume_from_checkpoint):
            try:
                super()._load_from_checkpoint(resume_from_checkpoint, model)
            except RuntimeError as error:  # PyTorch's error for tensors of another shape
                if "Error(s) in loading state_dict" not in str(error):
                    raise
                difference = " ".join(str(error).split())
                raise other_heads(resume_from_checkpoint, difference) from error

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
            raise other_heads(str(self.args.output_dir), f"only one has {differing[0]!r}")


@contextmanager
def _without_paths_of_checkpoints() -> Iterator[None]:
    """Leave out the warning that the best checkpoint is not where it was written."""

    def is_kept(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("The best checkpoint ")

    logger = logging.getLogger(Trainer.__module__)
    logger.addFilter(is_kept)
    try:
        yield
    finally:
        logger.removeFilter(is_kept)


@contextmanager
def _whole_intervals(args: TrainingArguments, max_steps: int) -> Iterator[None]:
    """Give intervals that are shares of all steps in steps.

    `Trainer` compares them with those of the checkpoint, which are in steps, and warns.
    """
    names = ("logging_steps", "eval_steps", "save_steps")
    shares = {name: getattr(args, name) for name in names if 0 < (getattr(args, name) or 0) < 1}
    try:
        for name, share in shares.items():
            setattr(args, name, ceil(max_steps * share))
        yield
    finally:
        for name, share in shares.items():
            setattr(args, name, share)
