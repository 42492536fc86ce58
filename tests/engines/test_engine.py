"""Engines prepare a stage once for each shape, and say what they cannot run."""

import pytest
import torch

from speclm.engines import Engine, GraphEngine
from speclm.errors import EngineError, SpeclmError
from tests.stand_ins import replaying


class Preparing(Engine):
    name = "preparing"
    reuses_storage = False

    def __init__(self, error=None):
        super().__init__()
        self.shapes, self.error = [], error

    def obstacle(self, device):
        return None

    def prepare(self, stage, inputs, storage):
        self.shapes.append(tuple(inputs[0].shape))
        if self.error is not None:
            raise self.error
        return lambda inputs, storage: stage(*inputs, *storage)


def doubled(values, storage):
    storage.add_(1)
    return (values * 2,)


def test_a_stage_is_prepared_once_for_each_shape():
    engine, storage = Preparing(), torch.zeros(3)
    for size in (2, 3, 2, 2):
        (found,) = engine.run(doubled, [torch.ones(size)], [storage])
        assert found.tolist() == [2.0] * size
    assert engine.shapes == [(2,), (3,)]
    assert engine.build_seconds > 0
    assert storage.tolist() == [4.0] * 3


@pytest.mark.parametrize("make", [Preparing, replaying])
def test_preparing_does_not_count_for_a_stage_that_must_not_run_twice(make):
    engine, storage = make(), torch.zeros(3)
    for _ in range(3):
        engine.run(doubled, [torch.ones(2)], [storage], is_repeatable=False)
    assert storage.tolist() == [3.0] * 3


def test_a_recording_that_fails_after_a_run_leaves_the_storage_as_it_was():
    def fail(compute, device):
        compute()  # as warm-ups do
        raise torch.OutOfMemoryError("no memory")

    engine, storage = GraphEngine(fail), torch.zeros(3)
    with pytest.raises(EngineError, match="no memory"):
        engine.run(doubled, [torch.ones(2)], [storage], is_repeatable=False)
    assert storage.tolist() == [0.0] * 3


@pytest.mark.parametrize("make", [Preparing, replaying])
def test_storage_at_another_address_is_prepared_for_where_it_matters(make):
    engine = make()
    for storage in (torch.zeros(1), torch.zeros(1)):
        for _ in range(2):
            engine.run(doubled, [torch.ones(2)], [storage])
        assert storage.item() > 1
    assert len(engine._prepared) == (2 if engine.reuses_storage else 1)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("12 MiB"), ValueError(), KeyError("a\nb")]
)
def test_what_cannot_be_prepared_is_one_kind_of_error_that_names_the_sizes(error):
    engine = Preparing(error)
    with pytest.raises(EngineError, match=r"\(4, 2\).*engine='eager'") as caught:
        engine.run(doubled, [torch.ones(4, 2)], [torch.zeros(1)])
    assert isinstance(caught.value, SpeclmError)
    assert type(error).__name__ in str(caught.value)
    assert "\n" not in str(caught.value)
    assert engine.build_seconds > 0
