"""The interface of acceptance rules: their input, their result, and the rules by name."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from speclm.devices import upload
from speclm.errors import OptionError, UnknownNameError
from speclm.sampling.chooser import TokenChooser
from speclm.sampling.draws import DraftSampling, Draws
from speclm.sampling.noise import PositionNoise
from speclm.tree.topology import TreeTopology


@dataclass(frozen=True, slots=True, eq=False)
class Verified:
    """A draft and the target's results for it.

    Args:
        draft_tokens: Token at each node; column 0 is the root.
        topology: Shape of the trees.
        logits: The target's logits after every node.
        chooser: Turns the target's logits into distributions and tokens.
        is_live: Rows that are still generated; decisions on other rows are ignored.
        noise: Noise of the positions, for rules with `uses_noise`; None when greedy.
        draws: Random draws of this generation, for rules with `uses_draws`.
        draft_distributions: Distribution that the children of each node were drawn from, for rules
            with `draft_sampling`. Rows of leaves may hold anything. None if the draft is only a
            root.
        lengths: Tokens of each row up to and including its root, padding included; needed if
            ``chooser.reads_lengths``.
    """

    draft_tokens: Int[Tensor, "batch nodes"]
    topology: TreeTopology
    logits: Float[Tensor, "batch nodes vocab"]
    chooser: TokenChooser
    is_live: list[bool]
    noise: PositionNoise | None = None
    draws: Draws | None = None
    draft_distributions: Float[Tensor, "batch nodes vocab"] | None = None
    lengths: list[int] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class TargetCandidates:
    """The target's likeliest tokens after each node that it verified.

    Args:
        ids: The tokens, best first.
        log_probs: Their log-probabilities, before any logits processor.
        nodes: For each row the node of the proposer's own draft that each column belongs to;
            further columns are padding. None if column i is node i.
    """

    ids: Int[Tensor, "batch nodes candidates"]
    log_probs: Float[Tensor, "batch nodes candidates"]
    nodes: list[list[int]] | None = None

    @classmethod
    def best(cls, logits: Float[Tensor, "batch nodes vocab"], *, num: int) -> "TargetCandidates":
        """Return the `num` likeliest tokens after each node, or all of a smaller vocabulary."""
        found = logits.topk(min(num, logits.shape[-1]), dim=-1)
        total = logits.float().logsumexp(-1, keepdim=True)
        return cls(found.indices, found.values.float() - total)

    def on_host(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Return ids and log-probabilities as arrays on the host; syncs with the device."""
        return self.ids.cpu().numpy(), self.log_probs.cpu().numpy()

    def nodes_of(self, row: int, *, num_nodes: int) -> list[int]:
        """Return the proposer's node at each column of a row, without padding.

        Args:
            row: The row.
            num_nodes: Nodes of the proposer's draft of this row.
        """
        num_columns = self.ids.shape[1]  # a draft may have been dropped for its root
        if self.nodes is None:
            return list(range(min(num_nodes, num_columns)))
        return [node for node in self.nodes[row][:num_columns] if node < num_nodes]


class Accepted:
    """The accepted path of every row and the tokens that the row emits.

    In a row that emits nothing (it has ended, or waits for slower rows) everything is -1 or empty.
    If drafts of several proposers were joined, each proposer is given the part of the path that it
    drafted itself, which may be shorter than the emitted tokens.

    Tensors of a result that was built on the host are sent to the device when they are asked for.
    """

    def __init__(self, path: Int[Tensor, "batch path"], tokens: Int[Tensor, "batch path"]) -> None:
        """Store what was decided.

        Args:
            path: Accepted nodes, the root first, padded with -1.
            tokens: Token that the target chose after each node of `path`, padded with -1. The last
                one is the bonus token, which becomes the next root.
        """
        self._device = path.device
        self._on_device: tuple[Tensor, Tensor] | None = (path, tokens)
        self._roots: Tensor | None = None
        self.features: Float[Tensor, "batch path hidden"] | None = None
        """Target features that each token was chosen from, if the proposer asks for them."""
        self.candidates: TargetCandidates | None = None
        """The target's likeliest tokens after every node, if the proposer asks for them."""

    @classmethod
    def from_host(
        cls, paths: list[list[int]], emitted: list[list[int]], *, device: torch.device
    ) -> "Accepted":
        """Build from host lists, which become `paths` and `emitted`."""
        made = cls.__new__(cls)
        made._device, made._on_device = device, None
        made.features = made.candidates = made._roots = None
        return made._with_host(paths=paths, emitted=emitted)

    @classmethod
    def from_both(
        cls,
        path: Int[Tensor, "batch path"],
        tokens: Int[Tensor, "batch path"],
        *,
        roots: Int[Tensor, " batch"],
        paths: list[list[int]],
        emitted: list[list[int]],
    ) -> "Accepted":
        """Build from tensors that the host has read.

        Args:
            path: Accepted nodes, the root first, and then anything.
            tokens: Token after each node of `path`, and then anything.
            roots: Last token of each row.
            paths: Accepted nodes on the host.
            emitted: Tokens on the host.
        """
        made = cls.from_host(paths, emitted, device=path.device)
        counts = list(map(len, emitted))
        if min(counts) < max(counts):
            levels = torch.arange(path.shape[1], device=path.device)
            is_beyond = levels >= upload([[count] for count in counts], path.device)
            path, tokens = path.masked_fill(is_beyond, -1), tokens.masked_fill(is_beyond, -1)
        made._on_device, made._roots = (path, tokens), roots
        return made

    @property
    def path(self) -> Int[Tensor, "batch path"]:
        """Accepted nodes, the root first, padded with -1."""
        return self._cut(self._tensors()[0])

    @property
    def tokens(self) -> Int[Tensor, "batch path"]:
        """Token that the target chose after each node of `path`, padded with -1."""
        return self._cut(self._tensors()[1])

    @property
    def sent_path(self) -> Int[Tensor, "batch path"] | None:
        """`path`, if the device has it already; there may be anything after the longest one."""
        return None if self._on_device is None else self._on_device[0]

    def _cut(self, part: Tensor) -> Tensor:
        """Drop what follows the longest row, if the device decided without knowing that."""
        return part if self._roots is None else part[:, : max(map(len, self.emitted))]

    def _tensors(self) -> tuple[Tensor, Tensor]:
        if self._on_device is None:
            width = max(map(len, self.emitted))
            both = [
                [row + [-1] * (width - len(row)) for row in rows]
                for rows in (self.paths, self.emitted)
            ]
            path, tokens = upload(both, self._device)
            self._on_device = path, tokens  # each [batch, path]
        return self._on_device

    @cached_property
    def paths(self) -> list[list[int]]:
        """`path` on the host, without padding; the first read syncs with the device."""
        return [[node for node in row if node >= 0] for row in self.path.tolist()]

    @cached_property
    def emitted(self) -> list[list[int]]:
        """`tokens` on the host, without padding; the first read syncs with the device."""
        return [
            row[: len(path)] for row, path in zip(self.tokens.tolist(), self.paths, strict=True)
        ]

    def roots_or_sent(self, last_tokens: list[int]) -> Int[Tensor, " batch"]:
        """Return the last token of each row; it is sent if the device has not decided on it."""
        return upload(last_tokens, self._device) if self._roots is None else self._roots

    @property
    def num_tokens(self) -> Int[Tensor, " batch"]:
        """Number of tokens that each row emits."""
        return (self.tokens >= 0).sum(1)

    @property
    def accepted_length(self) -> Int[Tensor, " batch"]:
        """Draft tokens accepted in each row, without the bonus token."""
        return ((self.path >= 0).sum(1) - 1).clamp(min=0)

    @property
    def bonus(self) -> Int[Tensor, " batch"]:
        """Last token emitted by each row; -1 in a row that emits nothing."""
        if self._roots is not None:
            return self._roots
        if self.path.shape[1] == 0:
            return self.path.new_full((len(self.path),), -1)
        return self.tokens.gather(1, (self.num_tokens - 1).clamp(min=0)[:, None])[:, 0]

    @property
    def last_features(self) -> Float[Tensor, "batch hidden"]:
        """Features of each row's bonus token; meaningless in a row that emits nothing."""
        assert self.features is not None, "the proposer asked for no features"
        last = [max(len(row) - 1, 0) for row in self.emitted]
        if len(set(last)) == 1:
            return self.features[:, last[0]]
        rows = torch.arange(len(last), device=self.features.device)
        indices = upload(last, self.features.device)
        return self.features[rows, indices]

    def with_features(self, node_features: Float[Tensor, "batch nodes hidden"]) -> "Accepted":
        """Return a copy with the features at the accepted nodes, given those at all nodes.

        They may share the memory of the given ones.
        """
        width = max(map(len, self.paths))
        if all(node == index for path in self.paths for index, node in enumerate(path)):
            return self.with_path_features(node_features.narrow(1, 0, width))
        if len(self.paths) == 1:
            return self.with_path_features(node_features.index_select(1, self.path[0, :width]))
        indices = self.path.clamp(min=0)[:, :, None].expand(-1, -1, node_features.shape[2])
        return self.with_path_features(node_features.gather(1, indices))

    def with_path_features(self, features: Float[Tensor, "batch path hidden"]) -> "Accepted":
        """Return a copy with features of each token."""
        made = copy(self)
        made.features = features
        return made

    def with_candidates(self, candidates: TargetCandidates | None) -> "Accepted":
        """Return a copy with the target's likeliest tokens; without any for None."""
        made = copy(self)
        made.candidates = candidates
        return made

    def with_paths(self, paths: list[list[int]]) -> "Accepted":
        """Return a copy with the same tokens on other, possibly shorter paths."""
        made = Accepted.from_host(paths, self.emitted, device=self._device)
        made.features, made.candidates = self.features, self.candidates
        return made

    def cut(self, limits: list[int]) -> "Accepted":
        """Keep at most ``limits[b]`` emitted tokens of row b."""
        if all(len(path) <= limit for path, limit in zip(self.paths, limits, strict=True)):
            return self
        return Accepted.from_host(
            [path[:limit] for path, limit in zip(self.paths, limits, strict=True)],
            [row[:limit] for row, limit in zip(self.emitted, limits, strict=True)],
            device=self._device,
        )

    def _with_host(self, **known: list[list[int]]) -> "Accepted":
        vars(self).update(known)  # where cached_property looks
        return self


class AcceptanceRule(ABC):
    """Decides which draft tokens are accepted, and which token follows them.

    Greedy decoding always uses the exact rule, whatever rule is set. A rule keeps no state between
    calls.

    Attributes:
        is_exact: Whether every token is the target's own choice after the tokens before it.
            Positions may then be decided one at a time.
        is_lossy: Whether outputs follow another distribution than the target's.
        uses_noise: Whether the rule decides by the noise of the positions, as regular generation
            does. Proposers then receive the noise.
        uses_draws: Whether the rule needs random draws of its own. They are seeded by one draw
            from the default generator of the logits' device.
        draft_sampling: How draft tokens must be chosen.
    """

    is_exact: ClassVar[bool] = False
    is_lossy: ClassVar[bool] = False
    uses_noise: ClassVar[bool] = False
    uses_draws: ClassVar[bool] = False
    draft_sampling: ClassVar[DraftSampling] = DraftSampling.NONE

    @property
    @abstractmethod
    def name(self) -> str:
        """Name of the rule in counters and reports."""

    @abstractmethod
    def accept(self, verified: Verified) -> Accepted:
        """Decide on every row of a draft.

        Returns:
            At least one token for each live row; -1 where the target's probabilities are NaN.
            Padding nodes are never accepted.
        """


_RULES: dict[str, type[AcceptanceRule]] = {}

RuleType = TypeVar("RuleType", bound=type[AcceptanceRule])


def register_acceptance_rule(name: str) -> Callable[[RuleType], RuleType]:
    """Register a rule as ``acceptance=name``; the class must be callable without arguments.

    Registering a name again replaces the class, so that a notebook cell can be run twice.

    Example:
        ```python
        @register_acceptance_rule("mine")
        class MyRule(AcceptanceRule): ...
        ```
    """

    def register(rule_type: RuleType) -> RuleType:
        _RULES[name] = rule_type
        return rule_type

    return register


def registered_acceptance_rules() -> dict[str, type[AcceptanceRule]]:
    """Return the registered classes by name."""
    return dict(_RULES)


def resolve_acceptance_rule(acceptance: object) -> AcceptanceRule:
    """Return the rule that an argument ``acceptance`` stands for.

    Args:
        acceptance: A rule, or a registered name for a rule with its defaults.

    Raises:
        UnknownNameError: If no rule has that name.
        OptionError: If it is neither a name nor a rule.
    """
    if isinstance(acceptance, AcceptanceRule):
        return acceptance
    if not isinstance(acceptance, str):
        raise OptionError(
            f"acceptance is {acceptance!r}, expected one of the names {sorted(_RULES)!r} or an "
            "AcceptanceRule; pass an instance, not a class"
        )
    if acceptance not in _RULES:
        raise UnknownNameError(
            f"acceptance {acceptance!r} is no registered rule, expected one of "
            f"{sorted(_RULES)!r}; decorate your own with @register_acceptance_rule"
        )
    return _RULES[acceptance]()
