"""A runner keeps storage for stages, and stops with the first failure."""

import torch

from speclm.engines import CompileEngine, StageRunner, agree
from tests.engines.test_engine import Preparing, doubled
from tests.stand_ins import replaying


def test_storage_is_zero_and_graphs_take_the_same_again():
    like = torch.ones(1)
    graphs = StageRunner(replaying())
    first = graphs.allocate(like, (2, 3))
    first.fill_(float("nan"))
    assert graphs.allocate(like, (2, 3)) is first
    assert first.tolist() == [[0.0] * 3] * 2
    assert graphs.allocate(like, (3, 2)).shape == (3, 2)
    assert StageRunner(replaying()).allocate(like, (2, 3)) is not first
    compiled = StageRunner(CompileEngine())
    assert compiled.allocate(like, (2,)) is not compiled.allocate(like, (2,))


def test_after_a_failure_no_stage_runs_and_the_reason_is_known():
    engine = Preparing(RuntimeError("no memory"))
    runner = StageRunner(engine)
    for _ in range(2):
        assert runner.run(doubled, [torch.ones(2)], [torch.zeros(1)]) is None
    assert "no memory" in runner.obstacle
    assert len(engine.shapes) == 1


def test_what_was_prepared_is_dropped_with_the_storage():
    runner = StageRunner(replaying())
    storage = runner.allocate(torch.ones(1), (1,))
    (found,) = runner.run(doubled, [torch.ones(2)], [storage])
    assert found.tolist() == [2.0, 2.0]
    runner.close()
    assert not runner.engine._prepared
    assert runner.allocate(torch.ones(1), (1,)) is not storage


def test_a_stage_that_is_forgotten_is_prepared_anew_and_others_are_not():
    engine = Preparing()
    runner = StageRunner(engine)

    def other(values, storage):
        return (values,)

    for stage in (doubled, other):
        runner.run(stage, [torch.ones(2)], [torch.zeros(1)])
    runner.forget(doubled)
    for stage in (doubled, other):
        runner.run(stage, [torch.ones(2)], [torch.zeros(1)])
    assert len(engine.shapes) == 3


def test_outputs_agree_within_rounding_and_never_with_what_is_no_number():
    expected = torch.tensor([1.0, 100.0])
    assert agree(expected + 0.5, expected)
    assert not agree(expected + 2.0, expected)
    assert not agree(expected * torch.nan, expected)
