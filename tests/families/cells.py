"""Calls of `generate` that every family is compared in, with a draft that is nearly right."""

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from speclm import SpecModel
from speclm.self_check.verdict import Verification
from speclm.stats import SpeculationStats
from speclm.testing import ScriptedProposer
from tests.families.building import shared_family
from tests.models import generate, prompts

NEW_TOKENS = 12
DEPTH = 4
WRONG_AT = (3, 4, 9)
MAX_FORWARDS = math.ceil(NEW_TOKENS / (DEPTH + 1)) + len(WRONG_AT)
"""Forwards that the draft takes when its tokens are kept wherever they are right."""

CELLS: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "greedy": ((11,), {"do_sample": False}),
    "sampled": ((9,), {"do_sample": True, "temperature": 0.8, "top_p": 0.95}),
    "padded rows": ((11, 5, 14), {"do_sample": True}),
    "repetition penalty": ((12, 6), {"do_sample": False, "repetition_penalty": 1.4}),
}
"""Lengths of the prompts, and settings."""

COMBINED = "padded rows"
"""The cell of every family in `make test`: sampled and padded; `DISTINCT` have the others too."""

DISTINCT = (
    "llama",
    "qwen2-window",
    "mixtral",
    "gemma3n_text",
    "deepseek_v3",
    "gpt2",
    "gpt_oss",
    "bloom",
    "gpt_neo",
    "qwen3_next",
    "mamba2",
    "llama4_text",
)
"""Families that differ in kind: windows, experts, latent and shared keys, positions, states."""


@dataclass(frozen=True, slots=True, eq=False)
class Comparison:
    """A call of `generate` next to regular generation.

    Args:
        expected: Tokens of regular generation, with the prompts.
        found: Ours.
        has_equal_state: Whether the random generator was left as regular generation leaves it.
        stats: Ours.
    """

    expected: Tensor
    found: Tensor
    has_equal_state: bool
    stats: SpeculationStats

    @property
    def num_forwards(self) -> int:
        """Forwards of the target; the prompt's own verifies a draft as well."""
        return 1 + self.stats.rounds

    @property
    def is_identical(self) -> bool:
        """Whether tokens and generator are those of regular generation."""
        return torch.equal(self.found, self.expected) and self.has_equal_state


@cache
def shared_spec(name: str) -> SpecModel:
    """Return a wrapped model of a family; give it a proposer before every call."""
    return SpecModel(shared_family(name), None)


@cache
def shared_plain(name: str, cell: str) -> tuple[Tensor, Tensor]:
    """Return what `plain` does for a family of the table."""
    return plain(shared_family(name), cell)


def plain(model: PreTrainedModel, cell: str) -> tuple[Tensor, Tensor]:
    """Return the tokens of regular generation and the generator's state after it."""
    lengths, settings = CELLS[cell]
    return generate(model, prompts(*lengths), max_new_tokens=NEW_TOKENS, **settings)


def compare(spec: SpecModel, cell: str, *, reference: tuple[Tensor, Tensor]) -> Comparison:
    """Decode a cell with a draft that is wrong only at `WRONG_AT`.

    Args:
        spec: Gets a proposer.
        cell: One of `CELLS`.
        reference: What `plain` returns for it.
    """
    lengths, settings = CELLS[cell]
    inputs = prompts(*lengths)
    expected, state = reference
    # A chain has one candidate at each depth; a tree has a wrong one before the true one.
    spec.proposer = ScriptedProposer(
        expected[:, inputs["input_ids"].shape[1] :].tolist(),
        wrong_at=WRONG_AT,
        depth=DEPTH,
        num_siblings=0 if spec.self_check.verification is Verification.CHAINS else 1,
    )
    found, found_state = generate(spec, inputs, max_new_tokens=NEW_TOKENS, **settings)
    stats = spec.last_speculation
    assert stats is not None
    return Comparison(expected, found, torch.equal(found_state, state), stats)
