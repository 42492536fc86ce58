"""Compile what the launchers launch, for GPUs that this machine does not have, and read the result.

Triton's wheel holds the compilers and disassemblers of both makers. All that stands in the way is
the driver, which is asked for the GPU to compile for: a stub answers.
"""

import re
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from speclm.kernels._triton_attention import attention_launches
from speclm.kernels.inputs import TreeAttentionInputs
from speclm.kernels.launch import Launch, LaunchConfig, LaunchPlan
from speclm.tree.topology import num_words

SHARED_LIMITS = {
    "sm_80": 166_912,
    "sm_86": 101_376,
    "sm_89": 101_376,
    "sm_90": 232_448,
    "sm_100": 232_448,
    "sm_120": 101_376,
    "gfx90a": 65_536,
    "gfx942": 65_536,
    "gfx1100": 65_536,
}
"""Bytes of shared memory that one program may ask for."""

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True, slots=True)
class Compiled:
    """What a compiled kernel needs and does.

    Args:
        registers: Registers of a thread, on AMD vector registers.
        spills: Instructions that write registers to memory and read them back.
        shared: Bytes of shared memory.
        matrix: Matrix instructions by name: ``HGMMA`` are those of Hopper's warp groups.
        async16: Copies of 16 bytes to shared memory that are not waited for.
        seconds: What compiling took.
    """

    registers: int
    spills: int
    shared: int
    matrix: dict[str, int]
    async16: int
    seconds: float


class _StubDriver:
    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> GPUTarget:
        return self._target  # compiled kernels are kept by device

    def get_current_stream(self, device: object) -> int:
        return 0


@contextmanager
def _compiling_for(architecture: str) -> Iterator[None]:
    if architecture.startswith("sm_"):
        target = GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)
    else:
        target = GPUTarget("hip", architecture, 64 if architecture.startswith("gfx9") else 32)
    driver.set_active(_StubDriver(target))
    try:
        yield
    finally:
        driver.set_active(None)  # found anew when it is asked for


def compile_for(architecture: str, launch: Launch) -> Compiled:
    """Compile a launch, whose tensors may be on no device, for a GPU such as ``"sm_90"``."""
    began = time.perf_counter()
    with _compiling_for(architecture):
        kernel = launch.kernel.warmup(*launch.arguments, grid=launch.grid, **launch.options)
    seconds = time.perf_counter() - began
    if "cubin" in kernel.asm:
        return _read_cubin(kernel.asm["cubin"], kernel.metadata.shared, seconds)
    return _read_amdgcn(kernel.asm["amdgcn"], kernel.metadata.shared, seconds)


def _read_cubin(cubin: bytes, shared: int, seconds: float) -> Compiled:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run("cuobjdump", "-res-usage", file.name)
        code = _run("nvdisasm", "-c", file.name)
    names = re.findall(r"\b(HGMMA|HMMA|UTC\w*MMA|STL|LDL|FFMA)\b", code)
    return Compiled(
        registers=_number(r"REG:(\d+)", usage),
        spills=names.count("STL") + names.count("LDL"),
        shared=shared,
        matrix={name: names.count(name) for name in sorted({*names} - {"STL", "LDL", "FFMA"})},
        async16=len(re.findall(r"\bLDGSTS[\w.]*\.128", code)),
        seconds=seconds,
    )


def _read_amdgcn(code: str, shared: int, seconds: float) -> Compiled:
    spills = _number(r"\.vgpr_spill_count:\s*(\d+)", code)
    scratch = _number(r"\.private_segment_fixed_size:\s*(\d+)", code)
    return Compiled(
        registers=_number(r"\.vgpr_count:\s*(\d+)", code),
        spills=spills + scratch,
        shared=shared,
        matrix={"MFMA": len(re.findall(r"\bv_mfma", code))},
        async16=0,
        seconds=seconds,
    )


def _run(tool: str, *arguments: str) -> str:
    done = subprocess.run(
        [_TOOLS / tool, *arguments], check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    return done.stdout.decode()


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found is not None, f"{pattern} is not in {text[:200]}"
    return int(found[1])


def meta_inputs(
    *,
    nodes: int,
    groups: int = 4,
    head_dim: int = 128,
    dtype: torch.dtype = torch.bfloat16,
    batch: int = 2,
    kv_heads: int = 8,
    kv_len: int = 131_072,
    page_len: int = 0,
    has_all: bool = False,
    deterministic: bool = False,
) -> TreeAttentionInputs:
    """Return inputs of shapes and types alone, with all features switched on or none."""

    def empty(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    lengths = empty(batch, of=torch.int32)
    cache_shape = (batch, kv_heads, kv_len, head_dim)
    table = None
    if page_len:
        num_blocks = kv_len // page_len
        cache_shape = (batch * num_blocks, kv_heads, page_len, head_dim)
        table = empty(batch, num_blocks, of=torch.int32)
    return TreeAttentionInputs(
        query=empty(batch, kv_heads * groups, nodes, head_dim),
        key=empty(*cache_shape),
        value=empty(*cache_shape),
        prefix_lengths=lengths,
        ancestor_words=empty(batch, nodes, num_words(nodes), of=torch.int64),
        depths=empty(batch, nodes, of=torch.int32),
        prefix_starts=lengths if has_all else None,
        tree_starts=lengths if has_all else None,
        block_table=table,
        sinks=empty(kv_heads * groups) if has_all else None,
        scale=head_dim**-0.5,
        window=4096 if has_all else None,
        softcap=50.0 if has_all else None,
        deterministic=deterministic,
    )


def attention_kernels(
    inputs: TreeAttentionInputs, config: LaunchConfig, *, num_splits: int = 16
) -> list[Launch]:
    """Return the launches of tree attention, as its launcher makes them."""
    output = inputs.query.new_empty(inputs.batch, inputs.num_nodes, inputs.q_heads, inputs.head_dim)
    lse = inputs.query.new_empty(
        inputs.batch, inputs.q_heads, inputs.num_nodes, dtype=torch.float32
    )
    return attention_launches(inputs, LaunchPlan(config, num_splits), output, lse)
