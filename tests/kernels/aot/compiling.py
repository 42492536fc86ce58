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
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from speclm.kernels._triton_attention import attention_launches
from speclm.kernels.inputs import TreeAttentionInputs
from speclm.kernels.launch import Launch, LaunchConfig, LaunchPlan

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_MATRIX = ("HMMA", "HGMMA", "UTCHMMA")  # of Ampere, Hopper and Blackwell


@dataclass(frozen=True, slots=True)
class Compiled:
    """What a compiled kernel needs and does.

    Args:
        registers: Registers of a thread; on AMD those of vectors.
        spills: Instructions that write registers to memory or read them back; on AMD registers
            and bytes that are.
        shared: Bytes of shared memory.
        matrix: Matrix instructions by name.
        async_copies: Copies of 16 bytes to shared memory that are not waited for.
        barriers: Instructions that wait for all threads of a program.
        seconds: What compiling took.
    """

    registers: int
    spills: int
    shared: int
    matrix: dict[str, int]
    async_copies: int
    barriers: int
    seconds: float


class _StubDriver:
    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> GPUTarget:
        return self._target  # Triton keeps compiled kernels by device

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
        driver.set_active(None)  # looked for anew when it is asked for


def compile_for(architecture: str, launch: Launch) -> Compiled:
    """Compile a launch, whose tensors may have no values, for a GPU such as ``"sm_90"``."""
    began = time.perf_counter()
    with _compiling_for(architecture):
        kernel = launch.kernel.warmup(*launch.arguments, grid=launch.grid, **launch.options)
    seconds = time.perf_counter() - began
    if "cubin" in kernel.asm:
        return _read_cubin(kernel.asm["cubin"], kernel.metadata.shared, seconds)
    return _read_amdgcn(kernel.asm["amdgcn"], kernel.metadata.shared, seconds)


def attention_kernels(
    inputs: TreeAttentionInputs, config: LaunchConfig, *, num_splits: int = 16
) -> list[Launch]:
    """Return the launches of tree attention, as its launcher makes them."""
    batch, nodes, heads = inputs.batch, inputs.num_nodes, inputs.q_heads
    output = inputs.query.new_empty(batch, nodes, heads, inputs.head_dim)
    lse = inputs.query.new_empty(batch, heads, nodes, dtype=torch.float32)
    return attention_launches(inputs, LaunchPlan(config, num_splits), output, lse)


def _read_cubin(cubin: bytes, shared: int, seconds: float) -> Compiled:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run("cuobjdump", "-res-usage", file.name)
        code = _run("nvdisasm", "-c", file.name)
    names = re.findall(r"\*/\s+(?:@!?U?P\d+ )?(\w+)", code)  # without what follows a dot
    return Compiled(
        registers=_number(r"REG:(\d+)", usage),
        spills=names.count("STL") + names.count("LDL"),
        shared=shared,
        matrix={name: names.count(name) for name in _MATRIX if name in names},
        async_copies=len(re.findall(r"\bLDGSTS[\w.]*\.128\b", code)),
        barriers=names.count("BAR"),
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
        async_copies=0,
        barriers=len(re.findall(r"\bs_barrier", code)),
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
