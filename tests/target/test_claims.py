"""One generation has a model for itself, whatever else fails meanwhile."""

import threading

import pytest

from speclm.errors import BusyError
from speclm.target import exclusive


def test_object_is_free_again_after_an_error():
    claimed = object()
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), exclusive(claimed, name="model"):
            raise ZeroDivisionError


def test_second_claim_in_one_thread_names_the_object_and_the_place():
    claimed = object()
    with exclusive(claimed, name="org/model"):
        with pytest.raises(BusyError, match=r"org/model is generating already, in this thread"):
            exclusive(claimed, name="org/model").__enter__()
        with exclusive(object(), name="another"):
            pass
    with exclusive(claimed, name="org/model"):
        pass


def test_claim_of_another_thread_is_named():
    claimed, found = object(), []

    def claim() -> None:
        try:
            with exclusive(claimed, name="model"):
                pass
        except BusyError as error:
            found.append(str(error))

    with exclusive(claimed, name="model"):
        thread = threading.Thread(target=claim)
        thread.start()
        thread.join()
    assert len(found) == 1
    assert "MainThread" in found[0]
