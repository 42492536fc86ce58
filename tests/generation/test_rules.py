"""Acceptance rules in `generate`: what they keep, ask for and refuse."""

import pytest
import torch
from torch import Tensor

from speclm import SpecModel
from speclm.acceptance import RejectionRule, TypicalRule
from speclm.drafting.interface import Draft, Proposer
from speclm.errors import NumericalError, OptionError, UnknownNameError
from speclm.methods.draft_model.proposer import DraftModelProposer
from speclm.methods.eagle.proposer import EagleProposer
from speclm.methods.medusa.network import MedusaHeads, MedusaHeadsConfig
from speclm.methods.medusa.proposer import MedusaProposer
from speclm.methods.ngram.proposer import NgramProposer
from speclm.sampling import PositionNoise
from speclm.sampling.draws import Families
from tests.grids import turns
from tests.models import VOCAB_SIZE, build_model, generate, prompts, shared_model
from tests.proposers import random_eagle


def test_greedy_decoding_takes_the_exact_rule():
    base = shared_model("llama")
    spec = SpecModel(base, NgramProposer())  # which could not draw
    settings = {"do_sample": False, "max_new_tokens": 12}
    expected = base.generate(**prompts(6, 4), **settings)
    for acceptance in ("typical", "rejection"):
        found = spec.generate(**prompts(6, 4), **settings, acceptance=acceptance)
        assert torch.equal(found, expected)
        assert spec.last_speculation.acceptance == "exact"
        assert not spec.last_speculation.is_lossy


SAMPLED = {"do_sample": True, "temperature": 0.9, "top_k": 0}
RULES = [TypicalRule(), *map(RejectionRule, ("multi_round", "block", "traversal"))]


def drafter(kind: str) -> Proposer:
    base = shared_model("llama")
    if kind == "chain":
        return DraftModelProposer(base, target=base, num_draft_tokens=3, branches=1)
    if kind == "tree":
        other = shared_model("llama", 1)
        return DraftModelProposer(other, target=base, num_draft_tokens=7, width=2, branches=2)
    if kind == "eagle":
        return EagleProposer(random_eagle(base), target=base, tree=[2, 2])
    heads = MedusaHeads(MedusaHeadsConfig(base.config.hidden_size, VOCAB_SIZE, num_heads=2))
    heads.init_weights_(base.get_output_embeddings().weight)
    return MedusaProposer(heads, target=base, tree=[2, 2])


@pytest.mark.parametrize(
    ("kind", "rule"),
    [
        (kind, rule)
        for kind in ("chain", "tree", "medusa", "eagle")
        for rule in RULES
        if kind == "chain" or rule != RejectionRule("block")
    ],
)
def test_ragged_batches_end_at_their_ends_and_are_padded_there_alone(kind, rule):
    spec = SpecModel(shared_model("llama"), drafter(kind))
    ends, unused = list(range(1, 24)), VOCAB_SIZE - 1
    inputs, lengths = prompts(9, 3, 6), set()
    for seed in range(1):
        output, _ = generate(
            spec,
            inputs,
            seed=seed,
            **SAMPLED,
            max_new_tokens=25,
            eos_token_id=ends,
            pad_token_id=unused,
            suppress_tokens=[unused],
            acceptance=rule,
        )
        assert torch.equal(output[:, :9], inputs["input_ids"])
        for row in output[:, 9:].tolist():
            length = row.index(unused) if unused in row else len(row)
            assert set(row[length:]) <= {unused}
            assert not set(row[: length - 1]) & set(ends)
            assert length == 25 or row[length - 1] in ends
            lengths.add(length)
    assert len(lengths) > 1
    assert spec.last_speculation.acceptance == rule.name
    assert spec.last_speculation.is_lossy == rule.is_lossy


@pytest.mark.parametrize(
    ("kind", "acceptance"),
    turns(["chain", "tree", "medusa"], ["rejection", RejectionRule("traversal")]),
)
def test_seed_reproduces_a_run_and_moves_the_generator_by_one_draw(kind, acceptance):
    spec = SpecModel(shared_model("llama"), drafter(kind))
    settings = {**SAMPLED, "max_new_tokens": 10, "acceptance": acceptance}
    first, state = generate(spec, prompts(5, 7), seed=2, **settings)
    again, _ = generate(spec, prompts(5, 7), seed=2, **settings)
    other, _ = generate(spec, prompts(5, 7), seed=3, **settings)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    torch.manual_seed(2)
    torch.randint(2**63 - 1, ())
    assert torch.equal(torch.get_rng_state(), state)


def test_typical_draws_nothing():
    spec = SpecModel(shared_model("llama"), NgramProposer())
    torch.manual_seed(9)
    before = torch.get_rng_state()
    settings = {**SAMPLED, "max_new_tokens": 10, "acceptance": "typical"}
    first, state = generate(spec, prompts(5), seed=9, **settings)
    assert torch.equal(before, state)
    assert torch.equal(first, generate(spec, prompts(5), seed=1, **settings)[0])


def test_a_draft_model_that_is_the_target_is_always_kept():
    spec = SpecModel(shared_model("llama"), drafter("chain"))
    for acceptance in RULES[1:]:
        generate(spec, prompts(5, 8), **SAMPLED, max_new_tokens=16, acceptance=acceptance)
        assert spec.last_speculation.tau == pytest.approx(4.0, abs=0.3)


@pytest.mark.parametrize("kind", ["tree", "medusa", "eagle"])
def test_distributions_of_a_draft_are_what_its_network_says_below_each_node(kind):
    """And siblings are different tokens that their distribution allows."""
    drafts: list[Draft] = []
    inner = drafter(kind)
    original = inner.propose

    def propose(roots: Tensor, *, noise: PositionNoise | None) -> Draft:
        drafts.append(original(roots, noise=noise))
        return drafts[-1]

    inner.propose = propose  # type: ignore[method-assign]  # watches what passes
    spec = SpecModel(shared_model("llama"), inner)
    output, _ = generate(spec, prompts(5), **SAMPLED, max_new_tokens=8, acceptance="rejection")
    first = drafts[0] if kind == "tree" else drafts[-1]
    assert first.distributions is not None
    families = Families.of(first.topology.host_parents[0])
    for parent, children in zip(families.parents, families.children, strict=True):
        distribution, tokens = first.distributions[0, parent], first.tokens[0, children]
        assert distribution.sum() == pytest.approx(1.0, abs=1e-5)
        assert len(tokens.unique()) == len(children)
        assert (distribution[tokens] > 0).all()
        if kind == "tree":
            path = [node for node in first.topology.path_indices[0, parent].tolist() if node > 0]
            text = torch.cat([output[:, :5], first.tokens[:, path]], dim=1)
            logits = shared_model("llama", 1)(text).logits[0, -1]
            torch.testing.assert_close(
                distribution, (logits / 0.9).softmax(-1), rtol=1e-3, atol=1e-5
            )


def test_proposers_that_do_not_draw_are_refused_before_anything_is_computed(monkeypatch):
    spec = SpecModel(shared_model("llama"), NgramProposer())
    for name in ("prefill", "forward_tree"):
        monkeypatch.setattr(spec._target, name, None)
    with pytest.raises(OptionError, match=r"drafts drawn without replacement.*NgramProposer"):
        spec.generate(**prompts(4), do_sample=True, max_new_tokens=4, acceptance="rejection")


def test_unknown_rules_are_refused():
    spec = SpecModel(shared_model("llama"), None)
    with pytest.raises(UnknownNameError, match="'lossless' is no registered rule"):
        spec.generate(**prompts(4), acceptance="lossless")


def test_nan_is_reported_under_every_rule():
    base = build_model("llama")
    with torch.no_grad():
        base.get_output_embeddings().weight.fill_(float("nan"))
    for rule in RULES:
        spec = SpecModel(base, None)
        spec.self_check = SpecModel(shared_model("llama"), None).self_check
        with pytest.raises(NumericalError, match="NaN"):
            spec.generate(**prompts(4), **SAMPLED, max_new_tokens=4, acceptance=rule)


def test_report_names_the_rule_and_that_it_is_lossy():
    spec = SpecModel(shared_model("llama"), None)
    spec.generate(**prompts(4), **SAMPLED, max_new_tokens=4, acceptance="typical")
    lines: list[str] = []
    spec.print_report(write=lines.append)
    assert any("typical" in line and "lossy" in line for line in lines)
    record = spec.last_speculation.to_dict()
    assert record["is_lossy"] is True
    assert record["acceptance"] == "typical (epsilon 0.09, delta 0.3)"
