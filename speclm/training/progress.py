"""The progress bar of a training: the loss and the estimated tau."""

from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ProgressCallback
from typing_extensions import override


class TauProgress(ProgressCallback):
    """Shows the last loss and estimated tau behind the bar instead of printing every log."""

    @override
    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        bar: Any = self.training_bar  # None before training and in all processes but one
        if bar is None or not logs or "loss" not in logs:
            return
        shown = f"loss {logs['loss']:.3f}"
        if "estimated_tau" in logs:
            shown += f", estimated tau {logs['estimated_tau']:.2f}"
        bar.set_postfix_str(shown)
