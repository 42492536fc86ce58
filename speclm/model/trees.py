"""From what a user writes as ``tree`` to what drafts should be."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from speclm.drafting.interface import Proposer
from speclm.errors import OptionError
from speclm.files.atomic import read_json
from speclm.tree.plan import TreePlan
from speclm.tree.static import RankPaths, normalize_paths

AUTO = "auto"
"""The tree whose depth and size follow from measured times and acceptance."""

Tree = str | Path | Sequence[int] | Sequence[Sequence[int]] | TreePlan
"""What a user may write: "auto", a preset's name, a file of paths, widths, paths, or a plan."""


def normalize_tree(tree: Tree | None) -> TreePlan | str | None:
    """Return the plan that a user's description stands for, `AUTO`, or None.

    Raises:
        UnknownNameError: If no preset has that name.
        TopologyError: If paths are no tree.
        OptionError: If a file cannot be read.
    """
    if tree is None or isinstance(tree, TreePlan) or (isinstance(tree, str) and tree == AUTO):
        return tree
    is_file = isinstance(tree, Path) or (isinstance(tree, str) and tree.endswith(".json"))
    return TreePlan.of(read_tree(tree) if is_file else normalize_paths(tree))


def read_tree(path: Any) -> RankPaths:
    """Read a static tree from a JSON file, as ``speclm tune --save`` writes it.

    Raises:
        OptionError: If the file cannot be read.
        TopologyError: If it holds no tree.
        TreeBudgetError: If the tree is too deep.
    """
    try:
        found = read_json(Path(path))
    except (OSError, ValueError) as error:
        raise OptionError(
            f"tree {str(path)!r} cannot be read ({error}), expected a JSON file of paths such as "
            "[[0], [0, 0]]; write one with speclm tune --save"
        ) from error
    if isinstance(found, dict) and "tree" in found:
        found = found["tree"]
    return normalize_paths(found)


def require_fillable(tree: TreePlan | str | None, proposer: Proposer | None) -> None:
    """Check that a proposer can draft such trees.

    Raises:
        OptionError: If a static tree is given to a proposer that does not fill it.
    """
    if not isinstance(tree, TreePlan) or tree.paths is None:
        return
    if proposer is None:
        raise OptionError(
            f"tree has {len(tree.paths)} nodes and there is no proposer to fill it, expected one "
            "such as a draft model or Medusa heads; pass heads, or leave tree out"
        )
    if not proposer.fills_static_trees:
        raise OptionError(
            f"tree is a static one of {len(tree.paths)} nodes, which {type(proposer).__name__} "
            "cannot fill: it does not rank guesses; pass tree='auto', or "
            "TreePlan(depth=4, num_draft_tokens=8) for a bound alone"
        )
    num_ranks, rank = proposer.num_ranks, max(max(path) for path in tree.paths)
    if num_ranks is None:
        num_ranks = proposer.needs.vocab_size
    if num_ranks is not None and rank >= num_ranks:
        raise OptionError(
            f"tree asks for rank {rank}, the vocabulary has {num_ranks} tokens to guess; use "
            "smaller ranks"
        )
