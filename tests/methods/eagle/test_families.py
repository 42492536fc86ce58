"""EAGLE heads on bases of many families: the tokens of regular generation."""

from itertools import product
from typing import Any

import pytest
import torch

from speclm.methods.eagle.proposer import EagleProposer
from speclm.tree.plan import TreePlan
from tests.families.cells import shared_spec
from tests.grids import turns
from tests.methods.eagle.eagle_heads import heads_for
from tests.models import generate, prompts
from tests.proposers import HittingProposer

LAYERS = (0, 1)  # all that the tiny models have
FULL = {"min_probability": 0.0, "min_confidence": 0.0}
TREES: dict[str, tuple[dict[str, Any], TreePlan | None]] = {
    "grown": (FULL, None),
    "static": ({"tree": [3, 2, 1]}, None),
    "planned": (FULL, TreePlan(3, 5)),
}
FAMILIES = (
    ("llama", "grown"),
    ("qwen2", "static"),
    ("qwen3", "planned"),
    ("gemma2", "grown"),
    ("gemma3_text", "static"),
    ("gpt2", "grown"),
    ("gptj", "static"),
    ("phi3", "planned"),
    ("mixtral", "grown"),
    ("gpt_oss", "static"),
    ("starcoder2", "planned"),
    ("granite", "grown"),  # logits are scaled
    ("bloom", "grown"),  # takes chains
)
CELLS = {
    "greedy": ((11, 5, 14, 3), {"do_sample": False}),
    "sampled": ((9,), {"do_sample": True, "temperature": 0.8}),
}


@pytest.mark.parametrize(
    ("family", "case"), turns(FAMILIES, tuple(product(["eagle", "eagle3"], CELLS)))
)
def test_tokens_are_those_of_plain_decoding(family, case):
    (name, tree), (kind, cell) = family, case
    spec = shared_spec(name)
    heads = heads_for(spec.base, kind, layers=LAYERS)
    options, plan = TREES[tree]
    lengths, settings = CELLS[cell]
    inputs = prompts(*lengths)
    expected = generate(spec.base, inputs, max_new_tokens=10, **settings)
    reference = expected[0][:, max(lengths) :].tolist()
    eagle = EagleProposer(heads, target=spec.base, **options)
    eagle.plan = plan
    spec.proposer = HittingProposer(eagle, reference)
    found = generate(spec, inputs, max_new_tokens=10, **settings)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    assert spec.last_speculation.fallbacks == []
    assert spec.last_speculation.tau > 1.2
