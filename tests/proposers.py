"""Proposers that drive the decode loop in tests."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel
from typing_extensions import override

from speclm.acceptance import Accepted
from speclm.config import ProposerConfig
from speclm.drafting.combined import CombinedProposer
from speclm.drafting.interface import Draft, Prefill, Proposer
from speclm.methods.draft_model.proposer import DraftModelProposer
from speclm.methods.eagle.config import EagleConfig
from speclm.methods.eagle.network import EagleHeads
from speclm.methods.eagle.proposer import EagleProposer
from speclm.methods.lookup.proposer import LookupProposer
from speclm.methods.medusa.network import MedusaHeads, MedusaHeadsConfig
from speclm.methods.medusa.proposer import MedusaProposer
from speclm.methods.ngram.proposer import NgramProposer
from speclm.methods.recycling.proposer import RecyclingProposer
from speclm.sampling.noise import PositionNoise
from speclm.target import TargetFeatures
from speclm.testing import ScriptedProposer
from speclm.tree.topology import from_parents

DEPTH = 4
WRONG_AT = (3, 4, 11)


class HittingProposer(Proposer):
    """Lets another proposer draft, and puts the true tokens on its first path now and then.

    Proposers that nobody trained are accepted nowhere: so they see accepted paths of all lengths.
    """

    def __init__(
        self,
        inner: Proposer,
        reference: Sequence[Sequence[int]],
        *,
        hit_rate: float = 0.7,
        seed: int = 0,
    ) -> None:
        self.config = inner.config
        self._inner, self._reference, self._hit_rate = inner, reference, hit_rate
        self._generator = torch.Generator().manual_seed(seed)
        self._num_tokens: list[int] = []

    @property
    @override
    def features(self) -> TargetFeatures:  # type: ignore[override]  # the inner one decides
        return self._inner.features

    @property
    @override
    def num_observed(self) -> int:  # type: ignore[override]  # the inner one decides
        return self._inner.num_observed

    @override
    def begin(self, prompt: Prefill) -> None:
        self._num_tokens = [0] * len(prompt.first_tokens)
        self._inner.begin(prompt)

    @override
    def propose(self, roots: Int[Tensor, " batch"], *, noise: PositionNoise | None) -> Draft:
        draft = self._inner.propose(roots, noise=noise)
        tokens = draft.tokens.clone()
        parents = draft.topology.host_parents
        for row, done in enumerate(self._num_tokens):
            above = parents[row if len(parents) > 1 else 0]
            node = 0
            for token in self._reference[row][done:]:
                node = next(
                    (child for child in range(node + 1, len(above)) if above[child] == node), 0
                )
                if node == 0:
                    break
                if float(torch.rand((), generator=self._generator)) < self._hit_rate:
                    tokens[row, node] = token
        return replace(draft, tokens=tokens)

    @override
    def commit(self, accepted: Accepted) -> None:
        for row, emitted in enumerate(accepted.emitted):
            self._num_tokens[row] += len(emitted)
        self._inner.commit(accepted)


class RandomTreeProposer(Proposer):
    """Proposes a random tree per row, in which some nodes continue a reference and others do not.

    Rows differ in size and shape, siblings repeat tokens, and some nodes are padding in the midst
    of the tree: everything that the interface allows.
    """

    def __init__(
        self,
        reference: Sequence[Sequence[int]],
        *,
        vocab_size: int,
        num_nodes: int = 9,
        seed: int = 0,
    ) -> None:
        self.config = ProposerConfig(depth=num_nodes)
        self._reference = reference
        self._vocab_size = vocab_size
        self._num_nodes = num_nodes
        self._generator = torch.Generator().manual_seed(seed)
        self._num_tokens: list[int] = []

    @override
    def begin(self, prompt: Prefill) -> None:
        self._num_tokens = [0] * len(prompt.first_tokens)

    @override
    def propose(self, roots: Int[Tensor, " batch"], *, noise: PositionNoise | None) -> Draft:
        rows = [self._row(self._reference[row][done:]) for row, done in enumerate(self._num_tokens)]
        width = max(len(parents) for parents, _ in rows)
        tokens = [row + [1] * (width - len(row)) for _, row in rows]
        return Draft(
            tokens=torch.tensor(tokens),
            topology=from_parents([parents for parents, _ in rows], device=roots.device),
        )

    @override
    def commit(self, accepted: Accepted) -> None:
        for row, emitted in enumerate(accepted.emitted):
            self._num_tokens[row] += len(emitted)

    def _draw(self, bound: int) -> int:
        return int(torch.randint(bound, (), generator=self._generator))

    def _row(self, future: Sequence[int]) -> tuple[list[int], list[int]]:
        parents, tokens, depths = [0], [self._draw(self._vocab_size)], [0]
        for node in range(1, 1 + self._draw(self._num_nodes)):
            parent = max(self._draw(node), self._draw(node))  # rather deep than wide
            if self._draw(8) == 0 or (parent and parents[parent] == parent):
                parent = node  # padding
            depth = 0 if parent == node else depths[parent] + 1
            is_true = self._draw(4) > 0 and 0 < depth <= len(future)
            parents.append(parent)
            depths.append(depth)
            tokens.append(future[depth - 1] if is_true else self._draw(self._vocab_size))
        return parents, tokens


def random_heads(base: PreTrainedModel, *, num_heads: int = 3) -> MedusaHeads:
    """Return Medusa heads that fit a target and that nobody trained."""
    config = MedusaHeadsConfig(
        hidden_size=base.config.hidden_size,
        vocab_size=base.config.vocab_size,
        num_heads=num_heads,
    )
    heads = MedusaHeads(config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return heads.eval()


def random_eagle(base: PreTrainedModel) -> EagleHeads:
    """Return EAGLE heads that fit a target and that nobody trained."""
    heads = EagleHeads(EagleConfig.from_model_config(base.config, kind="eagle"))
    heads.init_weights_(generator=torch.Generator().manual_seed(3))
    return heads.eval()


PROPOSERS = (
    "scripted",
    "random tree",
    "ngram",
    "recycling",
    "lookup",
    "twin draft",
    "other draft",
    "random Medusa",
    "Medusa that hits",
    "EAGLE that hits",
    "joined",
    "none",
)


def build_proposer(
    kind: str,
    reference: Sequence[Sequence[int]],
    *,
    target: PreTrainedModel,
    draft: PreTrainedModel,
    seed: int = 0,
) -> Proposer | None:
    """Return a new proposer of a kind, None for ``"none"``.

    Args:
        kind: One of `PROPOSERS`.
        reference: New tokens of regular generation, for those that know them.
        target: The model that verifies.
        draft: A model of the same vocabulary that knows nothing of the target.
        seed: Where the planted errors fall.
    """
    vocab_size = target.config.vocab_size

    def medusa() -> Proposer:
        # Estimated probabilities of a random head mean nothing: its trees grow whatever they say.
        return MedusaProposer(random_heads(target), target=target, min_probability=0.0)

    build: dict[str, Callable[[], Proposer | None]] = {
        "scripted": lambda: ScriptedProposer(reference, depth=DEPTH, wrong_at=WRONG_AT),
        "random tree": lambda: RandomTreeProposer(reference, vocab_size=vocab_size, seed=seed),
        "ngram": NgramProposer,
        "recycling": lambda: RecyclingProposer(target, max_pairs=16),
        "lookup": lambda: LookupProposer(target, min_probability=0.01, history=64),
        "twin draft": lambda: DraftModelProposer(deepcopy(target), target=target),
        "other draft": lambda: DraftModelProposer(
            draft, target=target, depth=3, min_probability=0.0
        ),
        "random Medusa": medusa,
        "Medusa that hits": lambda: HittingProposer(medusa(), reference, seed=seed),
        "EAGLE that hits": lambda: HittingProposer(
            EagleProposer(random_eagle(target), target=target, min_probability=0.0),
            reference,
            seed=seed,
        ),
        "joined": lambda: CombinedProposer(
            [NgramProposer(), HittingProposer(medusa(), reference, seed=seed)]
        ),
        "none": lambda: None,
    }
    return build[kind]()
