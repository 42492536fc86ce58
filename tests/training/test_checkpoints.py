"""Which checkpoints can be resumed from, and the record of a training."""

import json
import logging

import pytest

from speclm.errors import CheckpointError
from speclm.training.arguments import training_arguments
from speclm.training.checkpoints import (
    RECORD_NAME,
    RunRecord,
    last_complete_checkpoint,
    require_state,
)
from tests.models import shared_model
from tests.training.runs import SETTINGS


@pytest.fixture
def record(tmp_path):
    def make_record(**options):
        args = training_arguments(tmp_path / "out", SETTINGS)
        rows = [{"input_ids": [1, 2, 3], "loss_mask": [0, 0, 1]}]
        return RunRecord.of(shared_model("llama"), args, dataset=rows, options=options)

    return make_record


def test_record_reads_back_as_it_was_written(tmp_path, record):
    mine = record(kind="dspark", sizes=(1, 2))
    mine.write(tmp_path / "new")
    mine.require_same(tmp_path / "new")
    assert json.loads((tmp_path / "new" / RECORD_NAME).read_text())["num_examples"] == 1


def test_options_that_differ_are_named(tmp_path, record):
    record(kind="dspark", decay=0.8).write(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"kind was 'dspark' and is 'dflash'; decay was 0\.8 and"
    ):
        record(kind="dflash").require_same(tmp_path)


def test_folder_without_a_record_is_resumed_with_a_line(tmp_path, record, caplog):
    with caplog.at_level(logging.WARNING, "speclm"):
        record().require_same(tmp_path)
    assert "speclm_training.json is missing" in caplog.text


@pytest.mark.parametrize("content", ["{", "[]", "[" * 10**5, '{"arguments": 3}'])
def test_damaged_record_is_refused(tmp_path, record, content):
    (tmp_path / RECORD_NAME).write_text(content)
    with pytest.raises(CheckpointError, match=r"cannot be read .*delete it|the training to resume"):
        record().require_same(tmp_path)


@pytest.fixture
def write(tmp_path):
    def write_checkpoint(step, state):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir(exist_ok=True)
        if state is not None:
            (folder / "trainer_state.json").write_text(state)
        return folder

    return write_checkpoint


def test_newest_checkpoint_is_found_by_number(tmp_path, write):
    assert last_complete_checkpoint(tmp_path / "nowhere") is None
    for step in (9, 100, 20):
        write(step, json.dumps({"global_step": step}))
    (tmp_path / "checkpoint-best").mkdir()
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-100"


def test_incomplete_checkpoint_is_skipped_with_a_line(tmp_path, write, caplog):
    complete = write(2, json.dumps({"global_step": 2}))
    for state in (None, '{"global_st', "[]", '{"global_step": 2}', "[" * 10**5):
        write(4, state)
        caplog.clear()
        with caplog.at_level(logging.WARNING, "speclm"):
            assert last_complete_checkpoint(tmp_path) == complete
        assert "checkpoint-4 is incomplete; resuming from an older" in caplog.text


def test_state_that_no_training_wrote_is_refused(write):
    require_state(write(3, '{"global_step": 3}'))
    for state, words in (
        ("[" * 10**5, "checkpoint-2: the checkpoint cannot be read .*nested"),
        ('{"wings": 1}', "cannot be read .*'wings'"),
        ("3", "cannot be read"),
        ('{"global_step": "x"}', "global_step is 'x'"),
        ('{"global_step": ' + "9" * 300 + "}", "global_step is 999"),
        ('{"best_model_checkpoint": 3}', "best_model_checkpoint 3"),
    ):
        with pytest.raises(CheckpointError, match=words):
            require_state(write(2, state))
