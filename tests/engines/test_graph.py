"""Graphs compute on inputs that are copied to fixed tensors."""

import pytest
import torch

from speclm.engines import GraphEngine
from tests.stand_ins import record, replaying


def counted(values, storage):
    storage.add_(values.sum())
    return values + 1, values * storage


def test_a_graph_reads_new_inputs_and_its_outputs_are_not_overwritten():
    engine, storage = replaying(), torch.zeros(1)
    engine.run(counted, [torch.zeros(2)], [storage])
    first = engine.run(counted, [torch.tensor([1.0, 2.0])], [storage])
    second = engine.run(counted, [torch.tensor([5.0, 5.0])], [storage])
    assert [part.tolist() for part in first] == [[2.0, 3.0], [3.0, 6.0]]
    assert [part.tolist() for part in second] == [[6.0, 6.0], [65.0, 65.0]]


def test_graphs_need_a_gpu_unless_something_else_records():
    assert "CUDA device" in GraphEngine().obstacle(torch.device("cpu"))
    assert GraphEngine().obstacle(torch.device("cuda", 1)) is None
    assert GraphEngine(record).obstacle(torch.device("cpu")) is None


@pytest.mark.gpu
def test_cuda_graphs_compute_what_the_stage_does():
    engine, storage = GraphEngine(), torch.zeros(1, device="cuda")
    inputs = [torch.arange(4.0, device="cuda"), torch.arange(4.0, 8.0, device="cuda")]
    engine.run(lambda values, kept: (values * 2 + 0 * kept,), inputs[:1], [storage])
    stage = next(iter(engine._prepared))[0]
    for values in inputs:
        (found,) = engine.run(stage, [values], [storage])
        assert torch.equal(found, values * 2)
