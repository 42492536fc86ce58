"""Kernels compiled for GPUs that are not here: what fits, what spills, what the code consists of.

That a kernel compiles does not mean that it can be launched, nor that it is fast: a tile that needs
more shared memory than there is, or registers that go through memory, are seen here alone. At most
8 kernels are compiled, a few seconds each.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch

from speclm.kernels._triton_tree_ops import keep_path_launch
from speclm.kernels.launch import LaunchConfig, plan_launch_on
from tests.kernels.aot.compiling import Compiled, attention_kernels, compile_for
from tests.kernels.meta_inputs import meta_inputs

MULTIPROCESSORS = 132
WARP_REGISTERS = 65_536  # of a multiprocessor; AMD's have more
RESERVED = 1024  # bytes of shared memory that the system takes for each program


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of shared memory.

    Args:
        program: Most that a program may ask for.
        multiprocessor: What all programs that run on one have.
    """

    program: int
    multiprocessor: int


MEMORY = {
    "sm_80": Memory(166_912, 167_936),
    "sm_90": Memory(232_448, 233_472),
    "sm_100": Memory(232_448, 233_472),
    "gfx942": Memory(65_536, 65_536),
}

FEW_ROWS = {"nodes": 4, "groups": 4}
MANY_ROWS = {"nodes": 32, "groups": 4, "dtype": torch.float16}
MASKED = {"nodes": 16, "groups": 4, "has_all": True}
UNEVEN = {"nodes": 64, "groups": 1, "head_dim": 80, "has_all": True}
PLAIN = {"nodes": 16, "groups": 4}
CASES = [
    pytest.param("sm_90", FEW_ROWS, id="sm_90, 16 rows"),
    pytest.param("sm_90", MASKED, id="sm_90, 64 rows, all features"),
    pytest.param("sm_90", MANY_ROWS, id="sm_90, 128 rows"),
    pytest.param("sm_80", UNEVEN, id="sm_80, 64 rows, all features, heads of 64 + 16"),
    pytest.param("sm_100", PLAIN, id="sm_100, 64 rows"),
    pytest.param("gfx942", MASKED, id="gfx942, 64 rows, all features"),
]


@pytest.fixture(autouse=True)
def _nothing_cached(tmp_path, monkeypatch) -> Iterator[None]:
    """Compile every time: Triton would take what an earlier run compiled."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    return


def compiled_attention(architecture: str, shape: dict) -> tuple[Compiled, LaunchConfig]:
    inputs = meta_inputs(**shape)
    plan = plan_launch_on(architecture, MULTIPROCESSORS, inputs)
    assert plan.num_splits > 1
    split, _ = attention_kernels(inputs, plan.config, num_splits=plan.num_splits)
    return compile_for(architecture, split), plan.config


@pytest.mark.parametrize(("architecture", "shape"), CASES)
def test_attention_fits_its_gpu_and_uses_its_instructions(architecture, shape):
    found, config = compiled_attention(architecture, shape)
    memory = MEMORY[architecture]
    is_amd = architecture.startswith("gfx")
    assert found.spills == 0
    assert found.shared <= memory.program
    reserved = 0 if is_amd else RESERVED
    assert config.programs * (found.shared + reserved) <= memory.multiprocessor
    if is_amd:
        assert found.registers <= 512
        assert found.matrix["MFMA"] > 0
        return
    # Registers are handed out in eights.
    registers = -(-found.registers // 8) * 8 * config.num_warps * 32
    assert config.programs * registers <= WARP_REGISTERS
    assert found.async_copies >= 16
    by_groups = {"sm_90": "HGMMA", "sm_100": "UTCHMMA"}.get(architecture, "HMMA")
    assert list(found.matrix) == ["HMMA" if config.block_rows < 64 else by_groups]


def test_merge_needs_few_registers():
    inputs = meta_inputs(**PLAIN)
    _, merge = attention_kernels(inputs, plan_launch_on("sm_90", 132, inputs).config)
    found = compile_for("sm_90", merge)
    assert found.spills == 0
    assert found.registers <= 64  # so that loads of several programs are under way at once


def test_threads_wait_between_reading_and_writing_of_a_path():
    storage = torch.empty(64, 1, 8, 4096, 128, dtype=torch.int16, device="meta")
    paths = torch.empty(1, 17, dtype=torch.int64, device="meta")
    lengths = torch.empty(1, dtype=torch.int64, device="meta")
    found = compile_for("sm_90", keep_path_launch(storage, paths, lengths, lengths))
    assert found.barriers > 0
    assert found.spills == 0
    assert found.registers <= 128
    assert found.shared == 0


@pytest.mark.slow
def test_what_spills_is_seen():
    config = LaunchConfig(block_rows=128, block_keys=64, num_warps=4, num_stages=2)
    split, _ = attention_kernels(meta_inputs(nodes=32, groups=4, head_dim=256), config)
    assert compile_for("sm_90", split).spills > 0
