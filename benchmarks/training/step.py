"""Measure what a step of `HeadsTrainer` takes, compared with a bare step of the same modules.

A bare step is forward, backward and optimizer on the same batch, in a loop without `Trainer`: no
figures such as the estimated tau, no logging, no clipping and no schedule. One follows each step of
the training, on heads of its own.

    PYTHONPATH=. python benchmarks/training/step.py
"""

import argparse
import os
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any
from unittest.mock import patch

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything needed is bundled

import torch
from torch import Tensor
from transformers import AutoTokenizer, TrainerCallback
from transformers.utils import logging
from typing_extensions import override

from benchmarks.decode.decode import load_model
from speclm.bench import append_record
from speclm.bench.pairs import Spread
from speclm.bench.records import Record
from speclm.demo.bundle import assets
from speclm.methods.registry import Recipe, registered_methods
from speclm.training.arguments import training_arguments
from speclm.training.dataset import load_examples
from speclm.training.heads_trainer import HeadsTrainer
from speclm.training.targets import IGNORED
from speclm.training.training_model import TrainingModel

NUM_WARM = 3  # steps of each kind that are not counted


@contextmanager
def without_figures() -> Iterator[None]:
    """Leave out of a forward what only the figures of a training need."""

    def no_ranks(_: Tensor, targets: Tensor) -> Tensor:
        return torch.zeros_like(targets)

    def no_tokens(_: TrainingModel, __: Tensor, loss_mask: Tensor) -> Tensor:
        return torch.full_like(loss_mask, IGNORED, dtype=torch.long)

    with (
        patch("speclm.training.training_model.rank_targets", no_ranks),
        patch("speclm.methods.medusa.training.rank_targets", no_ranks),
        patch.object(TrainingModel, "base_tokens", no_tokens),
    ):
        yield


class BareSteps(TrainerCallback):
    """Runs a bare step after each step of a training, and times both."""

    def __init__(self, trainer: HeadsTrainer, twin: HeadsTrainer) -> None:
        """Take the batches of one trainer, and model and optimizer of another."""
        self._batches: deque[dict[str, Tensor]] = deque()
        self._model, self._optimizer = twin.training_model, twin.create_optimizer()
        self._start = 0.0
        self.seconds: list[tuple[float, float]] = []
        collate = trainer.data_collator

        def keep(examples: Any) -> Any:
            batch = collate(examples)
            self._batches.append(dict(batch))
            return batch

        trainer.data_collator = keep

    @override
    def on_epoch_begin(self, *args: Any, **kwargs: Any) -> None:
        self._batches.clear()  # the last epoch's
        self._start = perf_counter()

    @override
    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        between = perf_counter()
        with without_figures():
            self._model(**self._batches.popleft())["loss"].backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.seconds.append((between - self._start, perf_counter() - between))
        self._start = perf_counter()


def measure(recipe: Recipe, options: argparse.Namespace) -> list[tuple[float, float]]:
    """Return the seconds of pairs of steps, those of the training first."""
    tokenizer = AutoTokenizer.from_pretrained(assets()["base"])
    examples = load_examples(assets()["prompts"] / "sql_tune.jsonl", tokenizer, max_length=512)
    settings = {
        "max_steps": options.steps + NUM_WARM,
        "per_device_train_batch_size": options.batch,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    with TemporaryDirectory() as folder:
        arguments = training_arguments(folder, settings, defaults=recipe.defaults)
        trainer, twin = (
            recipe.trainer(
                load_model("base", dtype=torch.float32, device="cpu"),
                arguments,
                options=recipe.options(),
                train_dataset=examples,
            )
            for _ in range(2)
        )
        pairs = BareSteps(trainer, twin)
        trainer.add_callback(pairs)
        trainer.train()
    return pairs.seconds[NUM_WARM:]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipes", nargs="+", default=["medusa", "eagle3", "block"])
    parser.add_argument("--steps", type=int, default=40, help="pairs of steps")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/training.jsonl"))
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    logging.disable_progress_bar()
    recipes = {
        recipe.name: recipe for method in registered_methods().values() for recipe in method.recipes
    }
    for name in options.recipes:
        pairs = measure(recipes[name], options)
        spread = Spread.of([ours / bare for ours, bare in pairs])
        bare = Spread.of([1e3 * bare for _, bare in pairs])
        record = Record(
            benchmark="training_step",
            settings={
                "method": name,
                "batch": options.batch,
                "prompts": "sql_tune",
                "bare_milliseconds": round(bare.median, 2),
            },
            unit="bare steps",
            n=len(pairs),
            median=spread.median,
            lower_quartile=spread.lower_quartile,
            upper_quartile=spread.upper_quartile,
            promises_identity=False,  # nothing is decoded
        )
        append_record(options.out, record)
        print(
            f"{name}: {spread.median:.3f} bare steps "
            f"[{spread.lower_quartile:.3f}, {spread.upper_quartile:.3f}], "
            f"bare {bare.median:.1f} ms, n {record.n}"
        )


if __name__ == "__main__":
    main()
