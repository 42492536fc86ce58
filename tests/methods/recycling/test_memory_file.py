import logging
import os
from pathlib import Path

import numpy as np
import pytest

from speclm.errors import CheckpointError, OptionError
from speclm.methods.recycling import memory_file
from speclm.methods.recycling.memory_file import MemoryFile

SIZES = {"vocab_size": 16, "fingerprint": "mine", "max_pairs": 50}


def remember(file: MemoryFile, previous: int, token: int, best: int) -> None:
    ids = (best + np.arange(file.memory.num_candidates)[None]) % 16
    file.memory.store([previous], [token], ids, np.full(ids.shape, -1.0))


def best_after(file: MemoryFile, previous: int, token: int) -> int | None:
    found = file.memory.find(previous, token)
    return found and found[1][0]


def test_memory_is_read_again_by_the_next_program(tmp_path):
    first = MemoryFile(tmp_path / "memory", **SIZES)
    remember(first, 1, 2, 7)
    first.save()
    second = MemoryFile(tmp_path / "memory", **SIZES)
    assert best_after(second, 1, 2) == 7
    assert not second.memory.has_changed


def test_file_is_written_only_when_something_has_changed_and_not_too_often(tmp_path, monkeypatch):
    path = tmp_path / "memory"
    file = MemoryFile(path, **SIZES)
    file.save()
    assert not path.exists()
    remember(file, 1, 2, 7)
    file.save_if_due()
    assert not path.exists()
    monkeypatch.setattr(memory_file, "SECONDS_PER_SAVE", 0.0)
    file.save_if_due()
    assert path.exists()


def test_what_another_program_wrote_meanwhile_is_kept(tmp_path):
    one, two = (MemoryFile(tmp_path / "memory", **SIZES) for _ in range(2))
    remember(one, 1, 2, 7)
    remember(two, 3, 4, 9)
    one.save()
    two.save()
    both = MemoryFile(tmp_path / "memory", **SIZES)
    assert best_after(both, 1, 2) == 7
    assert best_after(both, 3, 4) == 9


def test_file_that_cannot_be_written_is_logged_once_and_nothing_else_happens(tmp_path, caplog):
    file = MemoryFile(tmp_path / "no such folder" / "memory", **SIZES)
    with caplog.at_level(logging.WARNING, "speclm"):
        for best in (7, 8):
            remember(file, 1, 2, best)
            file.save()
    (record,) = caplog.records
    assert "memory is not saved any more, decoding goes on" in record.getMessage()
    assert best_after(file, 1, 2) == 8


def test_foreign_file_is_refused(tmp_path):
    file = MemoryFile(tmp_path / "memory", **SIZES)
    remember(file, 1, 2, 7)
    file.save()
    for other in ({"vocab_size": 17}, {"fingerprint": "yours"}):
        with pytest.raises(CheckpointError, match="expected"):
            MemoryFile(tmp_path / "memory", **{**SIZES, **other})
    (tmp_path / "memory").write_bytes(b"no memory")
    with pytest.raises(CheckpointError):
        MemoryFile(tmp_path / "memory", **SIZES)


@pytest.mark.parametrize("name", ["a\0b", "a\ud800"])
def test_path_that_no_file_can_have_is_an_option_error(name):
    with pytest.raises(OptionError, match=r"expected the path of a file .*; correct it"):
        MemoryFile(Path(name), **SIZES)


def test_child_of_a_fork_leaves_the_file_to_its_parent(tmp_path, monkeypatch):
    file = MemoryFile(tmp_path / "memory", **SIZES)
    remember(file, 1, 2, 7)
    monkeypatch.setattr(os, "getpid", lambda: -1)
    file.save()
    assert not (tmp_path / "memory").exists()


def test_forgetting_leaves_the_file_and_what_is_learned_later_is_added(tmp_path):
    path = tmp_path / "memory"
    file = MemoryFile(path, **SIZES)
    remember(file, 1, 2, 7)
    file.save()
    file.forget()
    file.save()
    assert best_after(MemoryFile(path, **SIZES), 1, 2) == 7
    for previous in (3, 4):
        remember(file, previous, 2, 9)
        file.save()
        assert best_after(file, 1, 2) in (None, 9)
    both = MemoryFile(path, **SIZES)
    assert [best_after(both, previous, 2) for previous in (1, 3, 4)] == [7, 9, 9]
