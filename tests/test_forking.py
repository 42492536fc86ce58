"""In the child of a fork nothing is left of what threads that are not there had changed."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from speclm import forking
from speclm.forking import reset_in_children, temporary
from tests.forks import in_child

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


@contextmanager
def changed_elsewhere(*changes: list[str]) -> Iterator[None]:
    """Have another thread make changes one after another, until the block ends."""
    has_changed, may_end = threading.Event(), threading.Event()

    def change() -> None:
        with temporary(changes[0].clear):
            changes[0].append("changed")
            with temporary(lambda: changes[1].append(f"undone before {changes[0]}")):
                has_changed.set()
                may_end.wait(60)

    thread = threading.Thread(target=change, daemon=True)
    thread.start()
    assert has_changed.wait(60)
    try:
        yield
    finally:
        may_end.set()
        thread.join(60)


def test_change_is_undone_at_the_end_and_after_an_error():
    changed, before = ["yes"], len(forking._CHANGES)  # interrupted tests may have left some
    with pytest.raises(KeyboardInterrupt), temporary(changed.clear):
        raise KeyboardInterrupt
    assert changed == []
    assert len(forking._CHANGES) == before


def test_changes_of_other_threads_are_undone_in_the_child_alone_and_the_last_one_first():
    first, second, own = list[str](), list[str](), ["own"]
    num_before = len(forking._CHANGES)
    with changed_elsewhere(first, second), temporary(own.clear):
        found = in_child(lambda: (first, second, own, len(forking._CHANGES)))
        assert found == ([], ["undone before ['changed']"], ["own"], num_before + 1)
        assert (first, second, own) == (["changed"], [], ["own"])
    assert own == []


def test_locks_are_renewed_before_anything_is_undone(monkeypatch):
    monkeypatch.setattr(forking, "_RESETS", [])
    first, second = list[str](), list[str]()
    reset_in_children(lambda: second.append(f"reset before {first}"))
    with changed_elsewhere(first, second):
        in_child(lambda: None)
        assert second == []
        assert in_child(lambda: second) == ["reset before ['changed']", "undone before ['changed']"]
