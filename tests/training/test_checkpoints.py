import json
import logging

import pytest

from speclm.training.checkpoints import last_complete_checkpoint


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


@pytest.mark.parametrize("state", [None, '{"global_st', "[]", '{"global_step": 2}'])
def test_checkpoint_that_was_cut_off_is_passed_over_with_a_line(tmp_path, write, caplog, state):
    whole = write(2, json.dumps({"global_step": 2}))
    write(4, state)
    with caplog.at_level(logging.WARNING, "speclm"):
        assert last_complete_checkpoint(tmp_path) == whole
    assert "checkpoint-4 was not written to its end" in caplog.text


def test_folder_without_checkpoints_has_none(tmp_path):
    assert last_complete_checkpoint(tmp_path / "nowhere") is None
