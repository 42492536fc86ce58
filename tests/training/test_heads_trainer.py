"""What the training of any heads refuses, and which data sets it takes."""

from pathlib import Path

import pytest
import torch
from torch.utils.data import Dataset, IterableDataset

from speclm.errors import CheckpointError, DataError
from speclm.methods.eagle.training import EagleTrainer, new_eagle_heads
from speclm.methods.medusa.training import MedusaTrainer, new_medusa_heads
from speclm.training.arguments import training_arguments
from speclm.training.assistant_tokens import TokenizedRow
from speclm.training.heads_trainer import HeadsTrainer
from speclm.training.rows import TrainingRows
from tests.models import build_model
from tests.training.runs import SETTINGS, StopAt
from tests.training.talks import WORDS

GOOD = TokenizedRow([5, 6, 7, 8], [0, 0, 1, 1])
SILENT = TokenizedRow([5, 6, 7, 8], [1, 1, 0, 0])  # the first guess is about the third token
LONG = TokenizedRow([5] * 17, [1] * 17)


class Items(Dataset):
    """Rows that are made when they are asked for."""

    def __init__(self, *masks):
        self.masks = masks

    def __len__(self):
        return len(self.masks)

    def __getitem__(self, index):
        return {"input_ids": [5] * len(self.masks[index]), "loss_mask": self.masks[index]}


class Stream(IterableDataset):
    """Rows without a length."""

    def __iter__(self):
        while True:
            yield {"input_ids": GOOD.tokens, "loss_mask": GOOD.loss_mask}


@pytest.fixture
def make(tmp_path):
    def make_trainer(kind="medusa", *, rows=None, eval_rows=None, num_heads=2, **options):
        base = build_model("llama", vocab_size=len(WORDS), max_position_embeddings=16)
        settings = {**SETTINGS, "save_strategy": "steps", "save_steps": 1, "max_steps": 1}
        callbacks = options.pop("callbacks", ())
        arguments = training_arguments(tmp_path, {**settings, **options})
        data = {"train_dataset": rows or TrainingRows([GOOD] * 4), "eval_dataset": eval_rows}
        if kind == "eagle":
            heads = new_eagle_heads(base, kind=kind)
            return EagleTrainer(base, heads, arguments, **data, callbacks=callbacks)
        heads = new_medusa_heads(base, num_heads=num_heads)
        return MedusaTrainer(base, heads, arguments, **data, callbacks=callbacks)

    return make_trainer


def test_trainer_without_a_writer_cannot_be_made():
    with pytest.raises(TypeError, match="_write"):
        HeadsTrainer()


@pytest.mark.parametrize("kind", ["medusa", "eagle"])
@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (SILENT, "row 1: the loss mask of 4 tokens is all zero after the second.*drop the row"),
        (LONG, r"row 1 has 17 tokens, expected at most 16.*cut rows with max_length=16"),
    ],
)
def test_rows_that_cannot_be_trained_on_are_named(make, kind, bad, words):
    with pytest.raises(DataError, match=words):
        make(kind, rows=TrainingRows([GOOD, bad]))
    with pytest.raises(DataError, match=words):
        make(kind, eval_rows=TrainingRows([GOOD, bad]))
    with pytest.raises(DataError, match=words):
        make(kind, eval_rows={"first": TrainingRows([GOOD]), "second": TrainingRows([GOOD, bad])})


def test_rows_are_checked_in_any_data_set_with_a_length(make):
    with pytest.raises(DataError, match="no rows to train on"):
        make(eval_rows=Items())
    with pytest.raises(DataError, match="row 0: the loss mask of 3 tokens"):
        make(rows=Items([0, 0, 0]))


def test_stream_of_rows_is_trained_on(make):
    trainer = make(rows=Stream(), train_sampling_strategy="random")
    trainer.train()
    assert trainer.state.global_step == 1


def test_checkpoint_of_other_heads_is_refused(make):
    make("medusa", max_steps=2, callbacks=[StopAt(1)]).train()
    with pytest.raises(CheckpointError, match=r"other heads.*size mismatch.*options.*began with"):
        make("medusa", num_heads=3).train(resume_from_checkpoint=True)
    with pytest.raises(CheckpointError, match=r"other heads than those in training \('heads\."):
        make("eagle").train(resume_from_checkpoint=True)


def test_damaged_checkpoint_is_refused_whichever_file_it_is(make, tmp_path):
    trainer = make("medusa", max_steps=2, callbacks=[StopAt(1)])
    trainer.train()
    (folder,) = map(str, tmp_path.rglob("checkpoint-1"))
    for name, load in (
        ("model.safetensors", trainer._load_from_checkpoint),
        ("optimizer.pt", trainer._load_optimizer_and_scheduler),
        ("rng_state.pth", trainer._load_rng_state),
    ):
        path = Path(folder, name)
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(CheckpointError, match=r"checkpoint-1: the checkpoint cannot be read"):
            load(folder)
    for missing in ("nowhere", folder):
        Path(folder, "trainer_state.json").write_text("[" * 10**5)
        with pytest.raises(CheckpointError, match=rf"{missing}: the checkpoint cannot be read"):
            trainer.train(resume_from_checkpoint=missing)


def test_meters_of_training_and_evaluation_are_apart(make):
    trainer = make("eagle", eval_rows=TrainingRows([GOOD] * 2))
    with torch.no_grad():
        trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader())))
    assert trainer.evaluate()["eval_step0_top1"] >= 0
    assert "step0_top1" in trainer._drain(is_training=True)
