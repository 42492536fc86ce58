"""Block heads on bases of many families: the tokens of regular generation."""

from itertools import product
from typing import Any

import pytest
import torch

from speclm.methods.block.proposer import BlockProposer
from speclm.tree.plan import TreePlan
from tests.families.cells import shared_spec
from tests.grids import turns
from tests.methods.block.target_heads import heads_for
from tests.models import generate, prompts
from tests.proposers import HittingProposer

LAYERS = (0, 1)  # all that the tiny models have
FULL = {"min_probability": 0.0}
TREES: dict[str, tuple[dict[str, Any], TreePlan | None]] = {
    "grown": (FULL, None),
    "static": ({"tree": [3, 2, 1]}, None),
    "planned": (FULL, TreePlan(3, 5)),
}
FAMILIES = (
    ("llama", "vanilla", "grown"),
    ("qwen2", "both ways", "static"),
    ("qwen3", "rnn", "planned"),
    ("gemma2", "gated in place", "grown"),
    ("gemma3_text", "window", "static"),
    ("gpt2", "vanilla", "planned"),
    ("gptj", "both ways", "grown"),
    ("phi3", "rnn", "static"),
    ("mixtral", "gated in place", "planned"),
    ("gpt_oss", "window", "grown"),
    ("starcoder2", "vanilla", "static"),
    ("granite", "both ways", "planned"),  # logits are scaled
    ("bloom", "rnn", "grown"),  # takes chains
    ("qwen3_next", "vanilla", "grown"),  # recurrent, takes chains
)
SETTINGS = {"greedy": {"do_sample": False}, "sampled": {"do_sample": True, "temperature": 0.8}}
SINGLE, BATCH = (9,), (11, 5, 14, 3)


@pytest.mark.parametrize(
    ("family", "case"), turns(FAMILIES, tuple(product(SETTINGS, [BATCH, SINGLE])))
)
def test_tokens_are_those_of_plain_decoding(family, case):
    (name, kind, tree), (cell, lengths) = family, case
    spec = shared_spec(name)
    heads = heads_for(spec.base, kind, layers=LAYERS)
    options, plan = TREES[tree]
    settings = SETTINGS[cell]
    inputs = prompts(*lengths)
    expected = generate(spec.base, inputs, max_new_tokens=10, **settings)
    reference = expected[0][:, max(lengths) :].tolist()
    block = BlockProposer(heads, target=spec.base, **options)
    block.plan = plan
    spec.proposer = HittingProposer(block, reference)
    found = generate(spec, inputs, max_new_tokens=10, **settings)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    assert spec.last_speculation.fallbacks == []
    assert spec.last_speculation.tau > 1.2
