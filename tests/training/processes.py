"""Trainings that two processes share, as a program that ``accelerate launch`` starts in each.

Its argument is a folder, into which each process writes what it logged, read and learned.
"""

import json
import os
import sys
from functools import wraps
from pathlib import Path

import torch

from speclm.cli._features import use_features
from speclm.training.arguments import training_arguments
from speclm.training.dataset import ExampleDataset
from speclm.training.heads_trainer import HeadsTrainer
from tests.training.cached import deep_base, random_texts, training_model
from tests.training.runs import SETTINGS, StopAt

NUM_ROWS = 9  # one is left for the last batch of an epoch
NUM_STEPS = 6  # two epochs
BROKEN_AT = 4  # within an epoch

RUNS = {
    "medusa": {"broken_at": BROKEN_AT},
    "random": {"method": "medusa", "train_sampling_strategy": "random"},
    "eagle3": {"is_cached": True},
    "divided": {"method": "eagle3", "broken_at": BROKEN_AT, "fsdp": True},
}


def train(folder, name, batch_size, *, broken_at=0, method=None, is_cached=False, **settings):
    """Train, break and resume if asked to, and return what this process logged, read and learned.

    Args:
        folder: For checkpoints and features.
        name: Name of the run.
        batch_size: Rows of a batch in each process.
        broken_at: Step after which the training ends and is resumed; 0 for none.
        method: The heads; by default those that give the run its name.
        is_cached: Whether hidden states are cached.
        **settings: Other training arguments.
    """
    settings = {
        **SETTINGS,
        "max_steps": NUM_STEPS,
        "per_device_train_batch_size": batch_size,
        "per_device_eval_batch_size": batch_size,
        "eval_strategy": "epoch",
        "save_strategy": "steps",
        "save_steps": BROKEN_AT,
        **settings,
    }
    texts, read = [*random_texts(NUM_ROWS + 1)], []
    for end in (broken_at, NUM_STEPS) if broken_at else (NUM_STEPS,):
        trainer = HeadsTrainer(
            training_model(method or name, deep_base()),
            training_arguments(folder / name, settings),
            train_dataset=ExampleDataset(texts[:NUM_ROWS]),
            eval_dataset=ExampleDataset(texts[:5]),
            callbacks=[StopAt(end)],
        )
        if is_cached:
            use_features(trainer, folder / "features", is_confirmed=True)
        note_rows(trainer.training_model, read)
        trainer.train(resume_from_checkpoint=end != broken_at and bool(broken_at))
    divided = trainer.has_divided_base
    heads = {name: value.tolist() for name, value in trainer.heads.state_dict().items()}
    return {"logs": trainer.state.log_history, "read": read, "heads": heads, "divided": divided}


def note_rows(model, read):
    """Add the texts that a model learns from to a list."""
    forward = model.forward

    @wraps(forward)
    def noted(**batch):
        if model.training:
            rows = zip(batch["input_ids"], batch["attention_mask"], strict=True)
            learned = batch["loss_mask"].any(1)
            texts = [tokens[mask.bool()].tolist() for tokens, mask in rows]
            read.extend(text for text, is_read in zip(texts, learned, strict=True) if is_read)
        return forward(**batch)

    model.forward = noted


def main(folder: Path) -> None:
    """Run all trainings, and write what this process found."""
    found = {name: train(folder, name, 2, **options) for name, options in RUNS.items()}
    (folder / f"process{os.environ['RANK']}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
