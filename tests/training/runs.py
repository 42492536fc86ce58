"""Settings of short trainings, and a callback that ends one early."""

from transformers import TrainerCallback

SETTINGS = {
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "logging_steps": 1,
    "save_strategy": "no",
    "disable_tqdm": True,
    "use_cpu": True,
}
CLOSE = 1e-6  # the same float32 sums in the same order


class StopAt(TrainerCallback):
    """Ends a training early, as if it were killed after a checkpoint."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step
