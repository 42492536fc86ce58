"""The shape of a draft: which node follows which."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import Tensor

from speclm.config import MAX_DEPTH, MAX_NODES
from speclm.devices import upload
from speclm.errors import TopologyError, TreeBudgetError
from speclm.tree.words import num_words, pack_words, signed_words, unpack_words


class TreeTopology:
    """Parents, depths and ancestors of the nodes of one tree per row.

    Node 0 is the root and its own parent. Any other node that is its own parent is padding: it
    belongs to no path, sees only itself, and makes rows of unequal size rectangular. A parent
    comes before its children. ``rows`` is 1 if all rows of the batch share the tree.

    Build one with `from_parents` or `chain` from lists on the host, or with `on_device` from a
    tensor that the host has not read. What is not given is computed when it is first asked for.
    """

    def __init__(
        self,
        parents: Int[Tensor, "rows nodes"],
        depths: Int[Tensor, "rows nodes"],
        *,
        max_depth: int,
        labels: Int[Tensor, "rows nodes"] | None = None,
        **known: Any,
    ) -> None:
        """Store what is known.

        Args:
            parents: Index of each node's parent.
            depths: Distance from the root; 0 for the root and for padding.
            max_depth: A depth that no node exceeds; of trees known to the host, the largest depth.
            labels: Numbers of the proposer's own for each node.
            **known: Values of the other properties, of which `ancestor_mask` or `ancestor_words` is
                needed.
        """
        self.parents, self.depths, self.max_depth = parents, depths, max_depth
        self.labels = labels
        vars(self).update(known)  # where cached_property looks

    @property
    def num_nodes(self) -> int:
        """Nodes per row, root and padding included."""
        return self.parents.shape[1]

    @property
    def is_on_host(self) -> bool:
        """Whether the host knows the parents, so that reading them does not sync."""
        return "host_parents" in vars(self)

    @cached_property
    def host_parents(self) -> list[list[int]]:
        """`parents` on the host; syncs if the host does not know them."""
        found: list[list[int]] = self.parents.tolist()
        return found

    @cached_property
    def host_labels(self) -> list[list[int]]:
        """`labels` on the host; syncs if the host does not know them."""
        assert self.labels is not None
        found: list[list[int]] = self.labels.tolist()
        return found

    @property
    def unread(self) -> list[Int[Tensor, "rows nodes"]]:
        """What the host does not know: `parents` and `labels`, or nothing."""
        if self.is_on_host:
            return []
        return [self.parents] if self.labels is None else [self.parents, self.labels]

    def tell_host(self, rows: list[list[int]]) -> None:
        """Take the values of `unread`, joined in each row, that the host has read."""
        nodes = self.num_nodes
        vars(self)["host_parents"] = [row[:nodes] for row in rows]
        vars(self)["host_labels"] = [row[nodes:] for row in rows]

    @cached_property
    def host_node_depths(self) -> list[list[int]]:
        """`depths` on the host."""
        return [_depths_of(row) for row in self.host_parents]

    @property
    def host_depths(self) -> list[int]:
        """Largest depth of each row."""
        return [max(row) for row in self.host_node_depths]

    @property
    def host_sizes(self) -> list[int]:
        """Number of nodes of each row, without padding."""
        return [
            1 + sum(node != parent for node, parent in enumerate(row)) for row in self.host_parents
        ]

    @cached_property
    def ancestor_words(self) -> Int[Tensor, "rows nodes words"]:
        """Bit ``j % 64`` of word ``j // 64`` is set if node j is node i or one of its ancestors."""
        return pack_words(self.ancestor_mask)

    @cached_property
    def ancestor_mask(self) -> Bool[Tensor, "rows nodes nodes"]:
        """True at ``[i, j]`` if node j is node i or one of its ancestors."""
        return unpack_words(self.ancestor_words, num_bits=self.num_nodes)

    @cached_property
    def path_indices(self) -> Int[Tensor, "rows nodes path"]:
        """Path from the root to each node, padded with -1; all -1 for padding nodes."""
        levels = _counted(self.path_ends.shape[2] - 1, self.parents.device)
        is_beyond = (levels > self.depths[:, :, None]) | (self.deepest_first == 0)[:, :, None]
        return self.path_ends[:, :, :-1].masked_fill(is_beyond, -1)

    @cached_property
    def path_ends(self) -> Int[Tensor, "rows nodes path_and_end"]:
        """Path from the root to each node, padded with 0, and the node itself at the end."""
        nodes = self.num_nodes
        order = _counted(nodes, self.parents.device)
        # Ancestors in their order are the path, because parents come before their children.
        paths = (
            order.where(self.ancestor_mask, nodes).sort(dim=2).values[:, :, : self.max_depth + 1]
        )
        ends = order[:, None].expand(len(paths), -1, -1)
        return torch.cat([paths.where(paths < nodes, 0), ends], dim=2)

    @cached_property
    def inner_mask(self) -> Bool[Tensor, "rows nodes nodes"]:
        """`ancestor_mask` without the root."""
        return self.ancestor_mask & (_counted(self.num_nodes, self.parents.device) > 0)

    @cached_property
    def deepest_first(self) -> Int[Tensor, "rows nodes"]:
        """Numbers that are larger for deeper nodes, and among equals for earlier ones.

        Positive, and 0 for padding.
        """
        order = _counted(self.num_nodes, self.parents.device)
        rated = (self.depths + 1) * self.num_nodes - order
        return rated.masked_fill((self.parents == order) & (order > 0), 0)

    def padded(
        self, num_nodes: int
    ) -> tuple[Int[Tensor, "rows num_nodes"], Bool[Tensor, "rows num_nodes num_nodes"]]:
        """Return depths and ancestor mask of the same trees with more padding; made once."""
        if num_nodes not in self._padded:
            missing = num_nodes - self.num_nodes
            mask = F.pad(self.ancestor_mask, (0, missing, 0, missing))
            itself = torch.eye(num_nodes, dtype=torch.bool, device=mask.device)
            # Copies, because stages are prepared for strides too.
            depths = F.pad(self.depths, (0, missing)).clone(memory_format=torch.contiguous_format)
            self._padded[num_nodes] = depths, mask | itself
        return self._padded[num_nodes]

    @cached_property
    def _padded(self) -> dict[int, tuple[Tensor, Tensor]]:
        return {}

    @cached_property
    def is_padding(self) -> Bool[Tensor, "rows nodes"]:
        """True at nodes that belong to no path."""
        return self.path_indices[:, :, 0] < 0

    def paths_to(self, nodes: Int[Tensor, " batch"]) -> Int[Tensor, "batch path"]:
        """Return the path from the root to one node of each row, padded with -1."""
        return _row_of_each(self.path_indices, nodes)

    def path_ends_of(self, nodes: Int[Tensor, " batch"]) -> Int[Tensor, "batch path_and_end"]:
        """Return the path to one node of each row, padded with 0, and the node at the end."""
        return _row_of_each(self.path_ends, nodes)


def _row_of_each(
    values: Int[Tensor, "rows nodes path"], nodes: Int[Tensor, " batch"]
) -> Int[Tensor, "batch path"]:
    """Return what belongs to one node of each row of the batch."""
    if len(values) == 1:
        return values[0].index_select(0, nodes)
    return values[_counted(len(nodes), nodes.device), nodes]


def from_parents(parents: Sequence[Sequence[int]], *, device: torch.device) -> TreeTopology:
    """Build the topology of one tree per row from host lists.

    Args:
        parents: For each row the parent of each node; 0 at node 0. Shorter rows are padded.
        device: Where the tensors are put.

    Raises:
        TopologyError: If a row is empty, or a node comes before its parent.
        TreeBudgetError: If a row has more than `MAX_NODES` nodes or `MAX_DEPTH` levels.
    """
    num_nodes = max(map(len, parents), default=0)
    if num_nodes > MAX_NODES:
        raise TreeBudgetError(
            f"tree has {num_nodes} nodes, a round holds at most {MAX_NODES}; draft fewer tokens"
        )
    rows = [_Row.of(row, num_nodes) for row in parents]
    max_depth = max((max(row.depths) for row in rows), default=0)
    if max_depth > MAX_DEPTH:
        raise TreeBudgetError(
            f"tree is {max_depth} levels deep, a round holds at most {MAX_DEPTH}; "
            "draft shorter continuations"
        )
    count, length = num_words(num_nodes), max_depth + 1
    flat = []
    for row in rows:
        line = [*row.parents, *row.depths, *row.rated()]
        for bits in row.ancestors:
            line += signed_words(bits, count)
        for node, path in enumerate(row.paths):
            line += path
            line += [0] * (length - len(path))
            line.append(node)
        flat.append(line)
    # One tensor, so that a device is sent to once.
    values = upload(flat, device)
    sizes = (num_nodes, num_nodes, num_nodes, count * num_nodes, (length + 1) * num_nodes)
    parent_indices, depths, rated, words, paths = values.split_with_sizes(sizes, dim=1)
    return TreeTopology(
        parent_indices,
        depths,
        max_depth=max_depth,
        deepest_first=rated,
        ancestor_words=words.view(-1, num_nodes, count),
        path_ends=paths.view(-1, num_nodes, length + 1),
        host_parents=[row.parents for row in rows],
        host_node_depths=[row.depths for row in rows],
    )


def on_device(
    parents: Int[Tensor, "rows nodes"],
    *,
    max_depth: int,
    labels: Int[Tensor, "rows nodes"] | None = None,
) -> TreeTopology:
    """Build the topology of trees that the host does not know; does not sync.

    Args:
        parents: For each row the parent of each node, which comes before it; 0 at node 0, and the
            node itself at padding. Not checked.
        max_depth: A depth that no node exceeds.
        labels: Numbers of the proposer's own for each node, which the host is told with the rest.

    Raises:
        TreeBudgetError: If there are more than `MAX_NODES` nodes or `MAX_DEPTH` levels.
    """
    rows, nodes = parents.shape
    if nodes > MAX_NODES or max_depth > MAX_DEPTH:
        raise TreeBudgetError(
            f"tree has {nodes} nodes on {max_depth} levels, a round holds at most {MAX_NODES} and "
            f"{MAX_DEPTH}; draft fewer tokens"
        )
    steps = torch.eye(nodes, device=parents.device, dtype=torch.float32).repeat(rows, 1, 1)
    steps.scatter_(2, parents[:, :, None], 1.0)  # to the node itself, and to its parent
    reach = 1
    while reach < max_depth:
        steps, reach = steps @ steps, 2 * reach  # positive where some steps lead from i to j
    mask = steps > 0
    depths = mask.sum(2).sub_(1)
    return TreeTopology(parents, depths, max_depth=max_depth, labels=labels, ancestor_mask=mask)


def trees_of(parents: Sequence[Sequence[int]], *, device: torch.device) -> TreeTopology:
    """Build a topology as `from_parents` does, and cache shapes that all rows share.

    For trees that change from round to round: building one takes longer than most drafts, and a
    few small shapes are the most common. If all rows have the same tree, the result has one row.
    """
    first = tuple(parents[0])
    if any(tuple(row) != first for row in parents):
        return from_parents(parents, device=device)
    return _shared_tree(first, device)


@lru_cache(maxsize=256)
def _shared_tree(parents: tuple[int, ...], device: torch.device) -> TreeTopology:
    return from_parents([parents], device=device)


@lru_cache(maxsize=4 * MAX_DEPTH)
def chain(depth: int, *, device: torch.device | None = None) -> TreeTopology:
    """Return the topology of one path of `depth` draft tokens below the root."""
    parents = [0, *range(depth)]
    return from_parents([parents], device=device or torch.device("cpu"))


@lru_cache(maxsize=MAX_NODES)
def _counted(num: int, device: torch.device) -> Int[Tensor, " num"]:
    return torch.arange(num, device=device)


def _depths_of(parents: list[int]) -> list[int]:
    depths: list[int] = []
    for node, parent in enumerate(parents):
        depths.append(0 if parent == node else depths[parent] + 1)
    return depths


@dataclass(frozen=True, slots=True)
class _Row:
    """One row of a topology while it is built, on the host."""

    parents: list[int]
    depths: list[int]
    ancestors: list[int]
    paths: list[list[int]]

    @classmethod
    def of(cls, parents: Sequence[int], num_nodes: int) -> "_Row":
        """Follow the parents of a row, and pad it to `num_nodes`."""
        if not parents or parents[0] != 0:
            raise TopologyError(
                f"row of parents is {list(parents)[:8]!r}, expected node 0 to be the root and its "
                "own parent (0); start every row with 0"
            )
        depths, ancestors, paths = [0], [1], [[0]]
        for node in range(1, len(parents)):
            parent = parents[node]
            if parent == node:
                depths.append(0)
                ancestors.append(1 << node)
                paths.append([])
                continue
            if not 0 <= parent < node or not paths[parent]:
                raise TopologyError(
                    f"node {node} has parent {parent}, expected an earlier node of the tree; "
                    "list parents before their children"
                )
            depths.append(depths[parent] + 1)
            ancestors.append(ancestors[parent] | 1 << node)
            paths.append([*paths[parent], node])
        padding = range(len(parents), num_nodes)
        depths += [0] * len(padding)
        ancestors += [1 << node for node in padding]
        paths += [[] for _ in padding]
        return cls([*parents, *padding], depths, ancestors, paths)

    def rated(self) -> list[int]:
        """Return `TreeTopology.deepest_first`."""
        num_nodes = len(self.parents)
        return [
            (depth + 1) * num_nodes - node if path else 0
            for node, (depth, path) in enumerate(zip(self.depths, self.paths, strict=True))
        ]


def path_products(parents: list[int], node_probs: list[float]) -> list[float]:
    """Return the product of probabilities from the root to each node; 1 at the root."""
    probabilities = [1.0]
    for node in range(1, len(parents)):
        parent = probabilities[parents[node]] if parents[node] != node else 0.0
        probabilities.append(min(node_probs[node], 1.0) * parent)
    return probabilities
