"""Merge the drafts of several proposers into one tree."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Int
from torch import Tensor
from typing_extensions import override

from speclm.acceptance import Accepted
from speclm.config import MAX_NODES, ProposerConfig, require_count, require_depth
from speclm.drafting.interface import Draft, Prefill, Proposer
from speclm.errors import OptionError
from speclm.sampling.noise import PositionNoise
from speclm.target import TargetFeatures
from speclm.tree.topology import from_parents


@dataclass(frozen=True, slots=True)
class CombinedConfig(ProposerConfig):
    """Settings of `CombinedProposer`.

    Args:
        depth: Maximum levels of any part.
        num_draft_tokens: Maximum nodes of the merged tree.
    """

    depth: int = 16
    num_draft_tokens: int = 24

    def __post_init__(self) -> None:
        require_depth("depth", self.depth)  # super() does not work in a slotted dataclass
        require_count("num_draft_tokens", self.num_draft_tokens, low=1, high=MAX_NODES - 1)


class CombinedProposer(Proposer):
    """Merges the trees of several proposers into one.

    A token that two parts draft after the same path becomes one node. Every part receives all
    emitted tokens, and the part of the accepted path that it drafted itself.

    Example:
        ```python
        proposer = CombinedProposer([NgramProposer(), DraftModelProposer(small, target=base)])
        ```
    """

    config: CombinedConfig

    def __init__(
        self, parts: list[Proposer] | tuple[Proposer, ...], *, num_draft_tokens: int = 24
    ) -> None:
        """Combine proposers.

        Args:
            parts: At least one. If some nodes do not fit, those of the first parts are kept.
            num_draft_tokens: Maximum nodes of the merged tree.

        Raises:
            OptionError: If there is no part, one is not a proposer, or one is given twice.
        """
        if not isinstance(parts, list | tuple):
            raise OptionError(f"parts is {parts!r}, expected a list of proposers; put it into one")
        if not parts:
            raise OptionError("no proposers to join, expected at least one, such as 'ngram'")
        for part in parts:
            if not isinstance(part, Proposer):
                raise OptionError(
                    f"part {part!r} is no Proposer; SpecModel.from_pretrained(base, [...]) also "
                    "takes names, folders and draft models"
                )
        singles = [single for part in parts for single in _singles(part)]
        if len({id(single) for single in singles}) < len(singles):
            raise OptionError(
                "one proposer is given twice, and its state is that of one; build another"
            )
        self.parts = tuple(parts)
        self.config = CombinedConfig(
            depth=max(part.config.depth for part in parts), num_draft_tokens=num_draft_tokens
        )
        self._joined: list[_JoinedRow] = []

    @property
    @override
    def needs_lockstep(self) -> bool:  # type: ignore[override]  # the parts decide
        return any(part.needs_lockstep for part in self.parts)

    @property
    @override
    def features(self) -> TargetFeatures:  # type: ignore[override]  # a part decides, not the class
        return TargetFeatures.union(part.features for part in self.parts)

    @override
    def begin(self, prompt: Prefill) -> None:
        self._joined = []
        for part in self.parts:
            part.begin(self._own_prompt(part, prompt))

    @override
    def propose(self, roots: Int[Tensor, " batch"], *, noise: PositionNoise | None) -> Draft:
        drafts = [part.propose(roots, noise=noise) for part in self.parts]
        tokens = [draft.tokens.tolist() for draft in drafts]  # trees are joined on the host
        self._joined = []
        for row in range(len(roots)):
            joined = _JoinedRow([0], [0], [])
            for draft, rows in zip(drafts, tokens, strict=True):
                parents = draft.topology.host_parents
                joined.add(rows[row], parents[row if len(parents) > 1 else 0], self.config)
            self._joined.append(joined)
        longest = max(len(joined.tokens) for joined in self._joined)
        padded = [joined.tokens + [0] * (longest - len(joined.tokens)) for joined in self._joined]
        found = torch.tensor(padded, device=roots.device, dtype=torch.long)
        return Draft(
            tokens=torch.cat([roots[:, None], found[:, 1:]], dim=1),
            topology=from_parents([joined.parents for joined in self._joined], device=roots.device),
        )

    @override
    def commit(self, accepted: Accepted) -> None:
        for index, part in enumerate(self.parts):
            own = accepted
            if accepted.features is not None and part.features != TargetFeatures.NONE:
                selected = self.features.select(accepted.features, part.features)
                own = own.with_path_features(selected)
            if self._joined:
                paths = [
                    _own_path(path, joined.own_nodes[index])
                    for path, joined in zip(accepted.paths, self._joined, strict=True)
                ]
                own = own.with_paths(paths)
            part.commit(own)
        self._joined = []

    def _own_prompt(self, part: Proposer, prompt: Prefill) -> Prefill:
        """Return the prompt with the features that a part requests."""
        if prompt.features is None or part.features == self.features:
            return prompt
        if part.features == TargetFeatures.NONE:
            return replace(prompt, features=None)
        return replace(prompt, features=self.features.select(prompt.features, part.features))


@dataclass(frozen=True, slots=True)
class _JoinedRow:
    """One row of the merged tree, on the host.

    Args:
        tokens: Token of each node; meaningless at the root.
        parents: Parent of each node.
        own_nodes: For each part, a map from merged nodes to the nodes of its own draft.
    """

    tokens: list[int]
    parents: list[int]
    own_nodes: list[dict[int, int]]

    def add(self, tokens: list[int], parents: list[int], config: CombinedConfig) -> None:
        """Add the nodes of the next part's tree that are not in the merged tree yet."""
        known = {
            (parent, token): node
            for node, (parent, token) in enumerate(zip(self.parents, self.tokens, strict=True))
            if node
        }
        joined = {0: 0}  # from the part's nodes to merged nodes
        for node in range(1, len(parents)):
            parent = joined.get(parents[node]) if parents[node] != node else None
            if parent is None:
                continue  # padding, or below a dropped node
            found = known.get((parent, tokens[node]))
            if found is None:
                if len(self.tokens) > config.num_draft_tokens:
                    continue
                found = len(self.tokens)
                known[parent, tokens[node]] = found
                self.tokens.append(tokens[node])
                self.parents.append(parent)
            joined[node] = found
        self.own_nodes.append({ours: own for own, ours in joined.items()})


def _singles(part: Proposer) -> list[Proposer]:
    """Return the single proposers that a part consists of."""
    if isinstance(part, CombinedProposer):
        return [single for inner in part.parts for single in _singles(inner)]
    return [part]


def _own_path(path: list[int], own_nodes: dict[int, int]) -> list[int]:
    """Return the start of a path that a proposer drafted itself, in its own nodes."""
    own: list[int] = []
    for node in path:
        if node not in own_nodes:
            break
        own.append(own_nodes[node])
    return own
