import json
import logging

import pytest

from speclm.errors import CheckpointError
from speclm.training.checkpoints import last_complete_checkpoint, require_state


@pytest.fixture
def write(tmp_path):
    def write_checkpoint(step, state):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if state is not None:
            (folder / "trainer_state.json").write_text(state)
        return folder

    return write_checkpoint


def test_newest_checkpoint_is_found_by_number(tmp_path, write):
    for step in (9, 100, 20):
        write(step, json.dumps({"global_step": step}))
    (tmp_path / "checkpoint-best").mkdir()
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-100"


@pytest.mark.parametrize("state", [None, '{"global_st', "[]", '{"global_step": 2}', "[" * 10**5])
def test_checkpoint_that_was_cut_off_is_passed_over_with_a_line(tmp_path, write, caplog, state):
    whole = write(2, json.dumps({"global_step": 2}))
    write(4, state)
    with caplog.at_level(logging.WARNING, "speclm"):
        assert last_complete_checkpoint(tmp_path) == whole
    assert "checkpoint-4 was not written to its end" in caplog.text


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ("[" * 10**5, "checkpoint-2: the checkpoint cannot be read .*nested"),
        ('{"wings": 1}', "cannot be read .*'wings'"),
        ("3", "cannot be read"),
        ('{"global_step": "x"}', "global_step is 'x'"),
        ('{"global_step": ' + "9" * 300 + "}", "global_step is 999"),
        ('{"best_model_checkpoint": 3}', "best_model_checkpoint 3"),
    ],
)
def test_state_that_no_training_wrote_is_refused(write, state, words):
    require_state(write(3, '{"global_step": 3}'))
    with pytest.raises(CheckpointError, match=words):
        require_state(write(2, state))


def test_folder_without_checkpoints_has_none(tmp_path):
    assert last_complete_checkpoint(tmp_path / "nowhere") is None
