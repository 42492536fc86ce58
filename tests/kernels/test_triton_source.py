"""What the sources of Triton kernels look like: claims that no run on small memory can test."""

import ast
from pathlib import Path

import pytest

import speclm.kernels

KERNELS = Path(speclm.kernels.__file__).parent
TREE_ATTENTION, TREE_MERGE = KERNELS / "_triton_attention.py", KERNELS / "_triton_merge.py"
SOURCES = sorted(KERNELS.glob("_triton_*.py"))
STRIDE_ENDINGS = ("_row", "_head", "_node", "_slot")
WIDENED = ("part", "row")  # indices of results and workspace, which grow with the batch


def jit_functions(source):
    for node in ast.parse(source.read_text()).body:
        if isinstance(node, ast.FunctionDef) and node.decorator_list:
            yield node


def parameters(function):
    return {argument.arg for argument in function.args.args}


def is_int64(node):
    """Whether an expression is converted as a whole, ``(...).to(tl.int64)``."""
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "to"
        and [ast.unparse(argument) for argument in node.args] == ["tl.int64"]
    )


def stride_products(function):
    """Factor and stride of every product of a parameter that is a stride."""
    names = {name for name in parameters(function) if name.endswith(STRIDE_ENDINGS)}
    names |= {name for name in parameters(function) if name.startswith("stride")}
    for node in ast.walk(function):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
            for stride, factor in ((node.left, node.right), (node.right, node.left)):
                if isinstance(stride, ast.Name) and stride.id in names:
                    yield factor, stride.id


def test_factor_of_every_stride_of_tree_attention_is_int64():
    narrow = [
        f"{function.name}: {ast.unparse(factor)} * {stride}"
        for function in jit_functions(TREE_ATTENTION)
        for factor, stride in stride_products(function)
        if not is_int64(factor)
    ]
    assert narrow == []


def test_every_stride_of_tree_attention_is_multiplied():
    functions = {each.name: each for each in jit_functions(TREE_ATTENTION)}
    split = functions["split_kernel"]
    strides = {name for name in parameters(split) if name.endswith(STRIDE_ENDINGS)}
    direct = {stride for _, stride in stride_products(split)}
    handed_on = {
        argument.id
        for node in ast.walk(split)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "_slots_at"
        for argument in node.args
        if isinstance(argument, ast.Name)
    }
    assert len(strides) == 11
    assert strides <= direct | handed_on
    assert {stride for _, stride in stride_products(functions["_slots_at"])} == {"stride_slot"}


def test_indices_of_results_and_workspace_are_int64():
    found = [
        ast.unparse(node.value)
        for source in (TREE_ATTENTION, TREE_MERGE)
        for function in jit_functions(source)
        for node in ast.walk(function)
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in WIDENED
    ]
    assert len(found) == 5
    # One is made int64, another computed from what is.
    assert [
        text for text in found if "tl.int64" not in text and not text.startswith("part *")
    ] == []


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_every_masked_load_says_what_stands_for_the_rest(source):
    for function in jit_functions(source):
        for node in ast.walk(function):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "tl.load":
                names = {keyword.arg for keyword in node.keywords}
                assert ("mask" in names) == ("other" in names), ast.unparse(node)
