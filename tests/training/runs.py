"""Settings of short trainings, a callback that ends one early, and losses of several batches."""

import torch
from transformers import TrainerCallback

from speclm.training.dataset import collate_examples

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


def require_sum_of_parts(model, examples, *, atol=1e-5):
    """Check that the losses of single examples, by their shares, add up to that of one batch.

    The gradients have to add up too. The tolerance is that of float32 sums in another order.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    whole = model(**collate_examples(examples))["loss"]
    wanted = torch.autograd.grad(whole, trained)
    batches = [collate_examples([example]) for example in examples]
    counts = [model.count_targets(batch["loss_mask"]) for batch in batches]
    together = model.count_targets(collate_examples(examples)["loss_mask"])
    torch.testing.assert_close(sum(counts), together)
    assert len({tuple(count.tolist()) for count in counts}) > 1  # a mean of means would differ
    parts = [
        model(**batch, shares=count / together)["loss"]
        for batch, count in zip(batches, counts, strict=True)
    ]
    torch.testing.assert_close(sum(parts), whole, atol=atol, rtol=0)
    for found, gradient in zip(torch.autograd.grad(sum(parts), trained), wanted, strict=True):
        torch.testing.assert_close(found, gradient, atol=atol, rtol=1e-4)
