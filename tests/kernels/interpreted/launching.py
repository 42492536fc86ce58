"""Launches of tree attention with sizes that tests choose, and how long they search."""

from dataclasses import replace

import hypothesis
from hypothesis import strategies as st
from torch import Tensor

from speclm.kernels._triton_attention import tree_attention_triton
from speclm.kernels.launch import LaunchConfig, LaunchPlan, plan_launch
from tests.kernels.tree_cases import Contents, TreeCase, lay_out

IS_DEEP = hypothesis.settings.get_current_profile_name() == "deep"


def _search(max_examples: int) -> hypothesis.settings:
    """Search for so many examples, always the same ones; a program takes 10 ms here."""
    return hypothesis.settings(
        max_examples=20 * max_examples if IS_DEEP else max_examples,
        derandomize=not IS_DEEP,
        deadline=None,
    )


search = _search(5)
quick_search = _search(3)  # of properties that launch several times


def plan(num_splits: int = 1, **sizes: int) -> LaunchPlan:
    """Tiles of 16 rows and 16 keys, or as told."""
    sizes = {"block_rows": 16, "block_keys": 16, "min_tiles": 1} | sizes
    return LaunchPlan(LaunchConfig(num_warps=4, num_stages=2, **sizes), num_splits)


@st.composite
def plans(draw: st.DrawFn, *, block_keys: int | None = None) -> LaunchPlan:
    """Plans of calls that need not be deterministic; some leave splits without a tile."""
    return plan(
        draw(st.sampled_from([1, 2, 3, 7])),
        block_rows=draw(st.sampled_from([16, 32, 64])),
        block_keys=block_keys or draw(st.sampled_from([16, 32, 64])),
        min_tiles=draw(st.sampled_from([1, 2])),
    )


def attend(
    case: TreeCase, how: LaunchPlan, contents: Contents | None = None
) -> tuple[Tensor, Tensor]:
    """Launch a case with a plan; returns the output and the logarithm of the denominator."""
    return tree_attention_triton(lay_out(case, contents), how)


def attend_as_planned(
    case: TreeCase, contents: Contents | None = None, *, num_splits: int | None = None
) -> tuple[Tensor, Tensor]:
    """Launch a case with the plan that a call of `tree_attention` gets."""
    inputs = replace(lay_out(case, contents), num_splits=num_splits)
    return tree_attention_triton(inputs, plan_launch(inputs))
