"""Faults planted in the tree-attention kernel: the checks next to this file have to see each
one."""

import faulthandler
import importlib.util
import multiprocessing
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import hypothesis
import pytest
import torch

import speclm.kernels
from speclm.kernels.launch import LaunchPlan
from tests.kernels.interpreted.distant import (
    FAR_AXES,
    FAR_CASE,
    no_copies_onto_itself,
    put_far,
    vast_numbers,
)
from tests.kernels.interpreted.launching import plan, plans
from tests.kernels.tree_cases import (
    TreeCase,
    assert_right,
    draw_contents,
    grow,
    lay_out,
    tree_cases,
)

pytestmark = pytest.mark.slow

KERNELS = Path(speclm.kernels.__file__).parent
ATTENTION, MERGE = "_triton_attention", "_triton_merge"
REPORT = "found"
NOT_A_FINDING = ("NameError", "TypeError", "AttributeError", "SyntaxError", "CompilationError")


@dataclass(frozen=True, slots=True)
class Fault:
    """A fault: text of the kernel's source, and what stands in its place.

    Args:
        name: What is wrong.
        old: Text that is replaced.
        new: Its replacement.
        count: How often the text is there.
        source: Name of the module.
    """

    name: str
    old: str
    new: str
    count: int = 1
    source: str = ATTENTION


def window_faults() -> Iterator[Fault]:
    yield Fault(
        "window by row index",
        "depth = tl.load(row_depths + num_slots - num_nodes + node, mask=is_row, other=0)",
        "depth = tl.where(is_row, num_slots - num_nodes + node, 0)",
    )
    yield Fault(
        "depths of the first slots",
        "row_depths + num_slots - num_nodes + node",
        "row_depths + node",
    )
    yield Fault(
        "depths of the first row", "depths_ptr + batch.to(tl.int64) * depths_row", "depths_ptr"
    )
    for name, new in (
        ("too early", "open_tile = tl.maximum(unseen + tl.max(depth), 0) // BLOCK_KEYS"),
        ("for the root", "open_tile = tl.cdiv(tl.maximum(unseen + tl.min(depth), 0), BLOCK_KEYS)"),
    ):
        old = "open_tile = tl.cdiv(tl.maximum(unseen + tl.max(depth), 0), BLOCK_KEYS)"
        yield Fault(f"loop without masks begins {name} under a window", old, new)
    yield Fault(
        "first tile is that of the deepest node",
        "tl.maximum(unseen + tl.min(depth), 0) // BLOCK_KEYS",
        "tl.maximum(unseen + tl.max(depth), 0) // BLOCK_KEYS",
    )
    yield Fault("window a slot too wide", "length - start - window + 1", "length - start - window")
    for name, by in (("wide", ""), ("narrow", " + 2")):
        new = f"length + hidden{by} - slot"
        yield Fault(f"window a slot too {name} in masks", "length + hidden + 1 - slot", new)
    yield Fault(
        "window a level too wide in the tree",
        "above[None, :] > hidden",
        "above[None, :] >= hidden",
    )
    yield Fault("window ignored in the tree", "is_tree & is_narrow", "is_tree & (window < 0)")
    yield Fault(
        "depth equal to the window taken for less",
        "tl.max(depth) >= window",
        "tl.max(depth) > window",
    )


def mask_faults() -> Iterator[Fault]:
    yield Fault("words of the first row", "words_ptr + batch.to(tl.int64) * words_row", "words_ptr")
    yield Fault("tree mask ignored", "tl.where(is_tree, 0, -1)  # all", "-1  # all")
    yield Fault("wrong mask word", "words_at + tl.maximum(in_tree, 0) // 64", "words_at")
    yield Fault("mask word not shifted", "(word >> (in_tree & 63))", "word")
    yield Fault("upper half ignored", "(word >> 32).to(tl.int32)", "word.to(tl.int32)")
    yield Fault("full word is empty", "tl.where(count > 63, -1, bits)", "bits")
    yield Fault("lowest bits of negative counts", "tl.maximum(count, 0)", "tl.abs(count)")
    for name, new in (("prefix", "BLOCK_KEYS)"), ("tree", "length - slot)")):
        in_tree = "BLOCK_KEYS" if name == "tree" else "num_slots - in_tree"
        old = "tl.where(is_tree, num_slots - in_tree, length - slot)"
        yield Fault(f"end of the {name} ignored", old, f"tl.where(is_tree, {in_tree}, {new}")
    yield Fault(
        "loop without masks a tile too long",
        "(length - start) // BLOCK_KEYS)",
        "(length - start) // BLOCK_KEYS + 1)",
    )
    yield Fault(
        "left padding ignored",
        "start = tl.load(starts_ptr + batch).to(tl.int32) if HAS_STARTS else 0",
        "start = 0",
    )
    yield Fault(
        "tree starts ignored",
        "begin = tl.load(begins_ptr + batch).to(tl.int32) if HAS_BEGINS else length",
        "begin = length",
    )


def split_faults() -> Iterator[Fault]:
    yield Fault("order of tiles depends on the tree", "open_tile = past\n", "open_tile += 0\n")
    yield Fault(
        "fixed splits overlap", "first = tl.maximum(first, split * FIXED_TILES)", "first += 0"
    )
    yield Fault(
        "last tiles lost", "tl.cdiv(past - first, num_splits)", "((past - first) // num_splits)"
    )
    yield Fault(
        "empty split's lse 0",
        "lse = maximum + tl.log2(divisor)",
        "lse = tl.where(total > 0, maximum, 0.0) + tl.log2(divisor)",
    )
    yield Fault(
        "parts not written",
        "has_seen = is_row & (total > 0)",
        "has_seen = is_row & (total < 0)",
    )
    yield Fault(
        "poisoned parts read",
        "mask=has_seen[:, None] & is_column[None, :]",
        "mask=is_part[:, None] & is_column[None, :]",
        source=MERGE,
    )
    for source in (ATTENTION, MERGE):
        yield Fault(
            f"row that has seen nothing is not a number in {source}",
            'finite = tl.where(highest == float("-inf"), 0.0, highest)',
            "finite = highest",
            source=source,
        )
    yield Fault(
        "only the first parts merged",
        "range(0, num_splits, BLOCK_SPLITS)",
        "range(0, BLOCK_SPLITS, BLOCK_SPLITS)",
        source=MERGE,
    )
    yield Fault(
        "parts of other heads merged",
        "tl.program_id(1).to(tl.int64) * num_splits",
        "(tl.program_id(1) // 2).to(tl.int64) * num_splits",
        source=MERGE,
    )
    yield Fault("earlier parts not scaled down", "mean * kept[:, None]", "mean", source=MERGE)


def softmax_faults() -> Iterator[Fault]:
    yield Fault("sink in natural log", "sink *= 1.4426950408889634", "sink *= 1.0")
    yield Fault(
        "sink in natural log in the merge",
        "maximum *= 1.4426950408889634",
        "maximum *= 1.0",
        source=MERGE,
    )
    yield Fault(
        "sink in the numerator",
        "mean *= kept[:, None]\n            if",
        "mean *= 1.0\n            if",
    )
    yield Fault("sink counted as nothing", "total += 1.0", "total += 0.0", source=MERGE)
    yield Fault("lse to base 2", "lse *= _LN_2", "lse *= 1.0")
    yield Fault(
        "lse to base 2 in the merge",
        "(maximum + tl.log2(total)) * _LN_2",
        "(maximum + tl.log2(total))",
        source=MERGE,
    )
    unit, cap = "(inputs.softcap or inputs.scale) * _LOG2_E,\n", "(inputs.softcap or 1.0) * _LOG2_E"
    yield Fault(
        "cap after log2e",
        f"{unit}            2 * inputs.scale / {cap}",
        f"(inputs.softcap or inputs.scale * _LOG2_E),\n            2 * inputs.scale / {cap}**2",
    )
    yield Fault("cap without its scale", "2 * inputs.scale / (inputs.softcap or 1.0)", "2.0")
    capped = "        scores = _cap(scores, cap_scale, HAS_CAP)\n"
    masked = '        scores = tl.where(_unpack(word, BLOCK_KEYS), scores, float("-inf"))\n'
    yield Fault("cap after masks", capped + masked, masked + capped)
    yield Fault(
        "earlier values not scaled down",
        "mean = _dot(shares, value, mean * kept[:, None], WIDEN)",
        "mean = _dot(shares, value, mean, WIDEN)",
        count=2,
    )
    yield Fault(
        "earlier rest of values not scaled down",
        "mean_rest = _dot(shares, value, mean_rest * kept[:, None], WIDEN)",
        "mean_rest = _dot(shares, value, mean_rest, WIDEN)",
        count=2,
    )
    yield Fault(
        "earlier sums not scaled down",
        "tl.fma(total, kept, tl.sum(shares, 1))",
        "(total + tl.sum(shares, 1))",
    )


def place_faults() -> Iterator[Fault]:
    heads = "kv_head * GROUPS + rows % GROUPS"
    yield Fault("order of a group swapped", heads, "kv_head * GROUPS + GROUPS - 1 - rows % GROUPS")
    yield Fault("heads across groups", heads, "rows % GROUPS * KV_HEADS + kv_head")
    yield Fault(
        "order of a group swapped in the merge",
        heads,
        "kv_head * GROUPS + GROUPS - 1 - rows % GROUPS",
        source=MERGE,
    )
    yield Fault(
        "values of the first key head", "value_ptr + kv_head.to(tl.int64) * value_head", "value_ptr"
    )
    for at, masked, name in (("is_key", True, "under"), ("at", False, "without")):
        yield Fault(
            f"other value buckets {name} masks",
            f"value = _load(at, {at}, DIM, REST, IS_MASKED={masked})",
            f"value = _load(at, {at}, DIM - REST, REST, IS_MASKED={masked})",
        )
    yield Fault(
        "rest of the key left out",
        "scores = _dot(query_rest, tl.trans(key), scores, WIDEN)",
        "scores += 0.0",
        count=2,
    )
    yield Fault(
        "strides of keys for values",
        "value_base, slot, columns, value_slot",
        "value_base, slot, columns, key_slot",
        count=2,
    )
    yield Fault("keys of the first row", " + batch.to(tl.int64) * key_row", "")


def offset_faults() -> Iterator[Fault]:
    for index, stride in (
        ("(slot + columns)", "stride_slot"),
        ("batch", "query_row"),
        ("head", "query_head"),
        ("node", "query_node"),
        ("batch", "key_row"),
        ("kv_head", "key_head"),
        ("batch", "value_row"),
        ("kv_head", "value_head"),
    ):
        before = " " if index == "head" else ""  # kv_head ends alike
        yield Fault(
            f"offset of {index} by {stride} is narrow",
            f"{before}{index}.to(tl.int64) * {stride}",
            f"{before}{index}.to(tl.int32) * {stride}",
        )
    yield Fault(
        "offset of a tile without masks is narrow",
        "slot.to(tl.int64) * stride_slot +",
        "slot.to(tl.int32) * stride_slot +",
    )


FAULTS = (
    *window_faults(),
    *mask_faults(),
    *split_faults(),
    *softmax_faults(),
    *place_faults(),
    *offset_faults(),
)

Run = Callable[..., tuple[torch.Tensor, torch.Tensor]]


def load(folder: Path, fault: Fault | None = None) -> Run:
    """Import copies of both modules, one of them with a fault; return what launches them."""
    modules = {}
    for name in (MERGE, ATTENTION):
        text = (KERNELS / f"{name}.py").read_text()
        if fault is not None and fault.source == name:
            text = text.replace(fault.old, fault.new)
        path = folder / f"copy{name}.py"
        path.write_text(text)  # Triton reads a kernel's source from its file
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(modules[name])
    modules[ATTENTION].merge_launch = modules[MERGE].merge_launch
    return modules[ATTENTION].tree_attention_triton


def small_cases() -> Iterator[tuple[TreeCase, LaunchPlan]]:
    """Cases for each feature, the quickest first."""
    tree = (grow("near_chain", 17), grow("uniform", 17))
    lengths = (33, 15)
    plain = TreeCase(tree, lengths)
    busy = {"kv_heads": 2, "groups": 3, "gaps": (1, 2), "starts": (3, 15), "nodes": 9}
    for case in (
        TreeCase(((0,),), (5,), groups=2),
        plain,
        replace(plain, **busy),
        replace(plain, softcap=2.0, sinks=3.0, groups=2),
        replace(plain, window=17, **busy),
        replace(plain, window=5, layout="key_beside_value", **busy),
        replace(plain, head_dim=80, layout="slots_first", **busy),
        TreeCase((grow("uniform", 70),), (64,), nodes=20),
    ):
        for num_splits in (1, 3):
            yield case, plan(num_splits)
    yield TreeCase((grow("uniform", 70),), (64,)), plan(block_rows=64, block_keys=64)
    yield replace(plain, head_dim=80, **busy), plan(2, block_keys=32)
    yield TreeCase((grow("chain", 20),), (128,), window=5), plan(11)
    yield TreeCase((grow("chain", 4),), (140,)), plan(11)
    yield TreeCase((grow("chain", 18),), (3,), window=17), plan(block_rows=32)


def window_grid() -> Iterator[tuple[TreeCase, LaunchPlan]]:
    for length in (64, 80, 100, 128):
        for window in (16, 17, 24, 33, 48):
            case = TreeCase((grow("near_chain", 17),), (length,), window=window)
            yield case, plan(block_rows=32)


def check_small(run: Run) -> None:
    for case, how in (*small_cases(), *window_grid()):
        contents = draw_contents(case)
        assert_right(case, run(lay_out(case, contents), how), contents)


def check_bits(run: Run) -> None:
    for window in (None, 24, 33):
        case = TreeCase((grow("near_chain", 33),), (64,), window=window, deterministic=True)
        contents = draw_contents(case)
        how = plan(2, fixed_tiles=8)
        whole = run(lay_out(case, contents), how)
        assert_right(case, whole, contents)
        for part in (1, 8, 17):
            first = replace(case, parents=(case.parents[0][:part],))
            inputs = lay_out(first, contents.tree_slots(slice(0, part)))
            assert torch.equal(run(inputs, how)[0], whole[0][:, :part])


def check_random(run: Run) -> None:
    @hypothesis.settings(
        max_examples=40,
        derandomize=True,
        deadline=None,
        database=None,
        phases=[hypothesis.Phase.generate],
    )
    @hypothesis.given(tree_cases(), plans(block_keys=16))
    def check(case: TreeCase, how: LaunchPlan) -> None:
        assert_right(case, run(lay_out(case), how))

    check()


def check_far(run: Run, numbers: torch.Tensor) -> None:
    with no_copies_onto_itself():
        for name, axis in FAR_AXES:
            inputs = put_far(lay_out(FAR_CASE), name, axis, numbers)
            assert_right(FAR_CASE, run(inputs, plan(2)))


@pytest.fixture(scope="module")
def numbers(tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    return vast_numbers(tmp_path_factory.mktemp("vast"))


def check_all(run: Run, numbers: torch.Tensor) -> None:
    check_small(run)
    check_far(run, numbers)
    check_bits(run)
    check_random(run)


def test_sound_kernel_passes_every_check(tmp_path, numbers):
    check_all(load(tmp_path), numbers)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # what a fault computes is no concern
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # Python: no thread holds a lock
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_planted_fault_is_caught(fault, tmp_path, numbers):
    text = (KERNELS / f"{fault.source}.py").read_text()
    assert text.count(fault.old) == fault.count, "the source has changed: plant the fault anew"
    # In a process of its own, as some faults read memory that is not there.
    process = multiprocessing.get_context("fork").Process(
        target=look_for, args=(fault, tmp_path, numbers)
    )
    process.start()
    process.join()
    crashed = process.exitcode < 0
    report = tmp_path / REPORT
    found = report.read_text() if report.exists() else ""
    assert crashed or found, "no check sees the fault"
    assert not any(name in found for name in NOT_A_FINDING), found


def look_for(fault: Fault, folder: Path, numbers: torch.Tensor) -> None:
    """Write down what the checks say about a faulty kernel."""
    faulthandler.disable()  # the exit code says enough
    try:
        check_all(load(folder, fault), numbers)
    except Exception as error:  # noqa: BLE001 - how a fault shows is not foreseen
        (folder / REPORT).write_text(f"{type(error).__name__}: {error}")
