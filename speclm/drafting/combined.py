"""Merge the drafts of several proposers into one tree."""

from dataclasses import replace
from statistics import fmean

from jaxtyping import Int
from torch import Tensor
from typing_extensions import override

from speclm.acceptance import Accepted
from speclm.drafting.growing import (
    LEAST_PROBABILITY,
    GrowthConfig,
    SourceProposer,
    TreeGrower,
    planned_growth,
)
from speclm.drafting.interface import Draft, Prefill, Proposer
from speclm.drafting.part_choice import PartChoice
from speclm.drafting.sources import CandidateSource, DraftSource
from speclm.errors import OptionError
from speclm.sampling.noise import PositionNoise
from speclm.target import TargetFeatures

_ALL, _DRAFTS, _LOOKUPS = range(3)


class CombinedProposer(Proposer):
    """Joins what several proposers draft into one tree, the likeliest nodes first.

    A token that two parts draft after the same path becomes one node. What counts is how often
    candidates of each part have been right, so a part that drafts badly loses its nodes. Parts that
    look tokens up, such as n-grams, also go on below the nodes of the others. Every part learns all
    emitted tokens, and the part of the accepted path that it drafted itself.

    With parts of both kinds, rounds with all of them are timed against rounds with one kind only,
    and most rounds have the choice with the most tokens per second.

    Example:
        ```python
        proposer = CombinedProposer([NgramProposer(), DraftModelProposer(small, target=base)])
        ```
    """

    config: GrowthConfig

    def __init__(
        self,
        parts: list[Proposer] | tuple[Proposer, ...],
        *,
        num_draft_tokens: int = 24,
        min_probability: float = 0.05,
    ) -> None:
        """Combine proposers.

        Args:
            parts: At least one.
            num_draft_tokens: Maximum nodes of the joined tree.
            min_probability: Least measured probability of acceptance at which a node is drafted
                for a single row; more in a batch.

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
        self.parts = tuple(singles)
        self.config = GrowthConfig(
            depth=max(part.config.depth for part in parts),
            num_draft_tokens=num_draft_tokens,
            min_probability=min_probability,
        )
        sources: list[CandidateSource] = []
        self._drafting: list[tuple[Proposer, DraftSource]] = []
        for part in singles:
            if isinstance(part, SourceProposer):
                sources += part.grower.sources
                continue
            self._drafting.append((part, DraftSource()))
            sources.append(self._drafting[-1][1])
        self.grower = TreeGrower(sources)
        self._lookups = frozenset(sources) - {source for _, source in self._drafting}
        self._choice = PartChoice(3 if self._drafting and self._lookups else 1)

    @property
    @override
    def needs_lockstep(self) -> bool:  # type: ignore[override]  # the parts decide
        return any(part.needs_lockstep for part in self.parts)

    @property
    @override
    def remembers(self) -> bool:  # type: ignore[override]  # the parts decide
        return any(part.remembers for part in self.parts)

    @property
    @override
    def num_observed(self) -> int:  # type: ignore[override]  # the parts decide
        return max(part.num_observed for part in self.parts)

    @property
    @override
    def features(self) -> TargetFeatures:  # type: ignore[override]  # a part decides, not the class
        return TargetFeatures.union(part.features for part in self.parts)

    @override
    def describe(self) -> str:
        return "; ".join([super().describe(), *self.grower.describe()])

    @override
    def forget(self) -> None:
        self.grower.forget()  # its sources are also those of parts that look tokens up
        for part in self.parts:
            part.forget()
        self._choice.forget()

    @override
    def begin(self, prompt: Prefill) -> None:
        key = None if prompt.chooser is None else prompt.chooser.key
        self._choice.begin((prompt.temperature, key, len(prompt.tokens)))
        self.grower.begin(prompt)
        for part, source in self._drafting:
            source.drop()
            part.begin(self._own_prompt(part, prompt))

    @override
    def propose(self, roots: Int[Tensor, " batch"], *, noise: PositionNoise | None) -> Draft:
        choice = self._choice.next()
        if choice != _LOOKUPS:
            for part, source in self._drafting:
                source.take(part.propose(roots, noise=noise))
        config = planned_growth(self.config, self.plan, num_rows=self.grower.num_live)
        if choice == _DRAFTS:  # those parts have left out what does not pay
            config = replace(config, min_probability=LEAST_PROBABILITY)
        self.grower.muted = self._lookups if choice == _DRAFTS else frozenset()
        return self.grower.propose(roots, config, noise=noise)

    @override
    def commit(self, accepted: Accepted) -> None:
        for part, source in self._drafting:
            own = accepted.with_candidates(None)  # they are numbered by the joined tree
            if accepted.features is not None and part.features != TargetFeatures.NONE:
                selected = self.features.select(accepted.features, part.features)
                own = own.with_path_features(selected)
            rows = enumerate(accepted.emitted)
            own = own.with_paths([source.path(row, emitted) for row, emitted in rows])
            part.commit(own)
        self.grower.commit(accepted)
        for _, source in self._drafting:
            source.drop()
        emitted = [len(row) for row in accepted.emitted if row]
        self._choice.record(fmean(emitted) if emitted else 0.0)

    def _own_prompt(self, part: Proposer, prompt: Prefill) -> Prefill:
        """Return the prompt with the features that a part requests."""
        if prompt.features is None or part.features == self.features:
            return prompt
        if part.features == TargetFeatures.NONE:
            return replace(prompt, features=None)
        return replace(prompt, features=self.features.select(prompt.features, part.features))


def _singles(part: Proposer) -> list[Proposer]:
    """Return the single proposers that a part consists of."""
    if isinstance(part, CombinedProposer):
        return list(part.parts)
    return [part]
