import inspect
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from torch._subclasses.fake_tensor import FakeTensorMode

from speclm.errors import KernelError
from speclm.kernels import inputs as inputs_module
from speclm.kernels import tree_attention
from speclm.kernels.backends import VARIABLE
from speclm.kernels.inputs import TreeAttentionInputs
from speclm.kernels.tree_attention import attention_backend
from speclm.tree.words import num_words
from tests.grids import turns
from tests.kernels.tree_cases import (
    EPSILON,
    TreeCase,
    assert_right,
    call,
    draw_contents,
    grow,
    lay_out,
    tree_cases,
)

CASE = TreeCase((grow("top_k", 9),), (20, 0), groups=3, kv_heads=2, head_dim=64)
BUSY = replace(CASE, nodes=7, starts=(5, 0), gaps=(0, 2), window=12, softcap=20.0, sinks=1.0)


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@given(tree_cases())
def test_reference_backend_computes_every_feature(case):
    assert_right(case, call(lay_out(case), backend="reference"))


@given(tree_cases(sizes=(4, 17)))
def test_chosen_backend_computes_every_feature(case):
    assert_right(case, call(lay_out(case)))


@pytest.mark.parametrize("dtype", EPSILON, ids=str)
@pytest.mark.parametrize("length", [1, 17, 33, 63])
def test_every_type_is_right_over_odd_sizes(length, dtype):
    case = replace(CASE, lengths=(length, length), dtype=dtype)
    assert_right(case, call(lay_out(case), return_lse=False))


def test_automatic_choice_on_a_cpu_is_the_reference_and_says_why():
    choice = attention_backend(lay_out(CASE))
    assert choice.backend == "reference"
    assert "Triton" in choice.reason


def test_triton_refuses_a_cpu_without_its_interpreter():
    with pytest.raises(KernelError, match="'triton' cannot be used: Triton"):
        call(lay_out(CASE), backend="triton")


def test_unknown_backend_is_refused():
    with pytest.raises(KernelError, match=r"backend is 'cutlass', expected one of .*'reference'"):
        call(lay_out(CASE), backend="cutlass")


def test_environment_forces_a_backend_on_calls_that_name_none(monkeypatch):
    inputs = lay_out(CASE)
    for name in ("sdpa", "reference"):  # models do without kernels under the first
        monkeypatch.setenv(VARIABLE, name)
        assert attention_backend(inputs).backend == "reference"
    monkeypatch.setenv(VARIABLE, "triton")
    assert attention_backend(inputs, "reference").backend == "reference"
    with pytest.raises(KernelError, match=f"'triton' cannot be used: .*{VARIABLE}"):
        call(inputs)
    monkeypatch.setenv(VARIABLE, "fastest")
    with pytest.raises(KernelError, match=f"{VARIABLE} is 'fastest'"):
        call(inputs)


def test_output_is_contiguous_with_nodes_before_heads():
    output, _ = call(lay_out(CASE), return_lse=False)
    assert output.shape == (2, 9, 6, 64)
    assert output.is_contiguous()


def test_denominator_is_returned_only_on_request():
    inputs = lay_out(BUSY)
    both = call(inputs)
    assert [part.shape for part in both] == [(2, 7, 6, 64), (2, 6, 7)]
    alone, nothing = call(inputs, return_lse=False)
    assert nothing.numel() == 0
    assert torch.equal(alone, both[0])


def test_scale_is_by_default_one_over_the_root_of_head_dim():
    inputs = lay_out(CASE)
    assert torch.equal(call(inputs, scale=None)[0], call(inputs, scale=1 / 8)[0])


@pytest.mark.parametrize("scale", [0.01, 2.0])
def test_scale_is_the_factor_of_the_scores(scale):
    contents = draw_contents(CASE)
    scaled = replace(contents, query=contents.query * (scale * CASE.head_dim**0.5))
    found = call(lay_out(CASE, contents), scale=scale, return_lse=False)
    assert_right(CASE, found, scaled)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_batch_without_rows_gives_results_without_rows(backend):
    case = replace(CASE, lengths=())
    inputs = lay_out(replace(case, lengths=(1,)))
    none = {name: getattr(inputs, name)[:0] for name in ("query", "key", "value", "prefix_lengths")}
    output, _ = call(inputs, **none, backend=backend, return_lse=False)
    assert output.shape == (0, 9, 6, 64)


def test_denominator_of_a_batch_without_rows_has_none():
    inputs = lay_out(replace(CASE, lengths=(1,)))
    none = {name: getattr(inputs, name)[:0] for name in ("query", "key", "value", "prefix_lengths")}
    assert call(inputs, **none)[1].shape == (0, 6, 9)


@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_gradients_are_refused_where_they_would_be_recorded(name):
    inputs = lay_out(CASE)
    leaf = getattr(inputs, name).clone().requires_grad_()
    with pytest.raises(KernelError, match=r"require gradients.*no_grad"):
        call(inputs, **{name: leaf})
    with torch.no_grad():
        call(inputs, **{name: leaf})


def test_values_are_checked_unless_told_otherwise():
    inputs = lay_out(CASE)
    wrong = {"depths": inputs.depths - 1}
    with pytest.raises(KernelError, match="depths holds a negative number"):
        call(inputs, **wrong)
    call(inputs, **wrong, check_values=False)


def test_shapes_are_checked_in_any_case():
    with pytest.raises(KernelError, match="window is 0"):
        call(lay_out(CASE), window=0, check_values=False)
    inputs = lay_out(CASE)
    words = inputs.ancestor_words.expand(2, -1, -1)
    with pytest.raises(KernelError, match="expected contiguous"):
        call(inputs, ancestor_words=words, check_values=False)


def test_shared_words_go_with_depths_of_each_row():
    inputs = lay_out(CASE)
    both = call(inputs, depths=inputs.depths.expand(2, -1))
    for found, expected in zip(both, call(inputs), strict=True):
        assert torch.equal(found, expected)


OP = torch.ops.speclm.tree_attention.default


@pytest.fixture
def _unchecked_sizes(monkeypatch):
    """Take shape checks off what is traced; to them, a size that is not known yet is no int."""
    monkeypatch.setattr(
        TreeAttentionInputs, "__init__", inspect.unwrap(TreeAttentionInputs.__init__)
    )
    for name, member in vars(TreeAttentionInputs).items():
        if isinstance(member, property):
            monkeypatch.setattr(TreeAttentionInputs, name, property(inspect.unwrap(member.fget)))
    monkeypatch.setattr(inputs_module, "num_words", inspect.unwrap(num_words))


def unchecked_call(inputs):
    fields = {name: getattr(inputs, name) for name in TreeAttentionInputs.__slots__}
    return inspect.unwrap(tree_attention)(**fields)


def arguments(inputs, backend="auto"):
    return (*(getattr(inputs, name) for name in TreeAttentionInputs.__slots__), backend)


@pytest.mark.usefixtures("_unchecked_sizes")
@pytest.mark.parametrize(
    ("case", "result"),
    turns(
        [CASE, BUSY, replace(BUSY, deterministic=True)],
        [(True, torch.float32), (False, torch.bfloat16), (True, torch.float64)],
    ),
)
def test_op_is_registered_as_torch_expects(case, result):
    return_lse, dtype = result
    inputs = replace(lay_out(replace(case, dtype=dtype)), return_lse=return_lse)
    torch.library.opcheck(OP, arguments(inputs))


@pytest.mark.parametrize("return_lse", [True, False])
def test_fake_results_have_the_shapes_of_real_ones(return_lse):
    inputs = replace(lay_out(BUSY), return_lse=return_lse)
    real = OP(*arguments(inputs))
    with FakeTensorMode() as mode:
        fake = OP(
            *(
                mode.from_tensor(part) if torch.is_tensor(part) else part
                for part in arguments(inputs)
            )
        )
    for one, other in zip(fake, real, strict=True):
        assert (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride())


@pytest.mark.usefixtures("_unchecked_sizes")
@pytest.mark.parametrize("case", [CASE, BUSY], ids=["few", "all"])
def test_compiled_call_is_one_graph_and_gives_the_same(case):
    compiled = torch.compile(unchecked_call, fullgraph=True, backend="aot_eager")
    inputs = lay_out(case)
    for found, expected in zip(compiled(inputs), call(inputs), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.usefixtures("_unchecked_sizes")
def test_compiled_call_follows_lengths_that_change():
    compiled = torch.compile(unchecked_call, fullgraph=True, backend="eager")
    for lengths in ((20, 0), (3, 20)):
        case = replace(CASE, lengths=lengths)
        assert_right(case, compiled(lay_out(case)))


@pytest.mark.usefixtures("_unchecked_sizes")
def test_call_is_compiled_for_sizes_that_are_not_known_yet():
    compiled = torch.compile(unchecked_call, fullgraph=True, dynamic=True, backend="eager")
    for slots, lengths in ((9, (20, 3)), (7, (5, 1, 2))):
        case = replace(BUSY, parents=(grow("top_k", slots),), starts=None, gaps=None)
        case = replace(case, lengths=lengths, nodes=slots - 2)
        assert_right(case, compiled(lay_out(case)))
