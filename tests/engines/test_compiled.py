"""Compiled stages compute the same, and change their storage in place."""

import pytest
import torch

from speclm.engines import CompileEngine
from speclm.errors import EngineError

# A C++ compiler takes 10 seconds for vectors of each instruction set, and for all headers.
FEW_COMPILATIONS = {
    "compile_threads": 1,
    "cpp.vec_isa_ok": False,
    "cpp_cache_precompile_headers": False,
}


def stored(values, slots, storage):
    storage.index_copy_(1, slots, values)
    return (storage.sum(1) * 2,)


@pytest.mark.untraced  # most of its time is PyTorch's
def test_a_compiled_stage_computes_the_same_and_writes_to_storage(monkeypatch):
    for name, value in FEW_COMPILATIONS.items():
        monkeypatch.setattr(f"torch._inductor.config.{name}", value)
    engine = CompileEngine()
    assert engine.obstacle(torch.device("cpu")) is None
    for first in (0, 2):
        values, slots = torch.ones(1, 2, 3), torch.arange(2) + first
        storage, expected = torch.zeros(1, 4, 3), torch.zeros(1, 4, 3)
        (found,) = engine.run(stored, [values, slots], [storage])
        assert torch.equal(found, stored(values, slots, expected)[0])
        assert torch.equal(storage, expected)


def branching(values):
    return (values if values.sum() > 1 else -values,)


def test_a_stage_that_reads_on_the_host_is_not_compiled():
    with pytest.raises(EngineError, match="'compile' cannot run"):
        CompileEngine().run(branching, [torch.ones(2)], [])
