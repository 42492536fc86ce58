import logging

import jaxtyping
import pytest
import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    GraniteMoeConfig,
    GraniteMoeForCausalLM,
)

from speclm import SpecModel
from speclm.acceptance import Accepted
from speclm.drafting.interface import Prefill
from speclm.errors import OptionError, TopologyError, VocabularyMismatchError
from speclm.methods.medusa.network import MedusaHeads, MedusaHeadsConfig
from speclm.methods.medusa.proposer import MedusaProposer
from tests.grids import turns
from tests.models import (
    FAMILIES,
    VOCAB_SIZE,
    build_model,
    generate,
    prompts,
    randomise,
    shared_model,
)

HIDDEN = 40
CPU = torch.device("cpu")


def random_heads(*, num_heads: int = 3, scale: float = 0.3, **numbers: object) -> MedusaHeads:
    config = MedusaHeadsConfig(
        **{"hidden_size": HIDDEN, "vocab_size": VOCAB_SIZE, "num_heads": num_heads, **numbers}
    )
    heads = MedusaHeads(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return heads


def prefill(batch: int) -> Prefill:
    return Prefill(
        tokens=torch.ones(batch, 2, dtype=torch.long),
        num_padding=torch.zeros(batch, dtype=torch.long),
        first_tokens=torch.ones(batch, dtype=torch.long),
        temperature=0.0,
        max_new_tokens=9,
    )


def spec_model(family: str = "llama", **options: object) -> SpecModel:
    base = shared_model(family)
    return SpecModel(base, MedusaProposer(random_heads(), target=base, **options))


TREES = {"widths": {"tree": [3, 2, 1]}, "growing": {"min_probability": 0.001}}


@pytest.mark.parametrize(
    ("settings", "lengths", "tree", "heads_of"),
    turns(
        [{}, {"do_sample": True}, {"do_sample": True, "top_p": 0.8}],
        [(1,), (4, 9, 6)],
        TREES,
        [*((family, True) for family in FAMILIES), ("llama", False), ("mistral", False)],
    ),
)
def test_any_heads_give_the_tokens_of_plain_decoding(settings, lengths, tree, heads_of):
    family, has_own_lm_head = heads_of
    base = shared_model(family)
    heads = random_heads(num_layers=2, has_own_lm_head=has_own_lm_head)
    spec = SpecModel(base, MedusaProposer(heads, target=base, **TREES[tree]))
    options = {**settings, "max_new_tokens": 14}
    inputs = prompts(*lengths)
    expected = generate(base, inputs, **options)
    found = generate(spec, inputs, **options)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    assert spec.last_speculation.fallbacks == []
    assert max(sum(row.offered) for row in spec.last_speculation.rows) > 0


def test_heads_that_repeat_the_target_draft_its_next_token_again():
    """A base that says one token for ever: fresh heads guess it at every depth."""
    base = build_model("llama", seed=3)
    with torch.no_grad():
        base.model.norm.weight.fill_(0.02)  # what the text changes, the self-check still sees
        base.model.norm.weight[0] = 1.0
        base.model.embed_tokens.weight[:, 0] = 1.0
        base.lm_head.weight[:, 0] = 0.0
        base.lm_head.weight[7, 0] = 20.0
        for layer in base.model.layers:
            layer.self_attn.o_proj.weight[0] = 0.0
            layer.mlp.down_proj.weight[0] = 0.0
    heads = MedusaHeads(MedusaHeadsConfig(HIDDEN, VOCAB_SIZE, num_heads=3))
    heads.init_weights_(base.lm_head.weight)
    spec = SpecModel(base, MedusaProposer(heads, target=base, tree=[1, 1, 1]))
    inputs = prompts(5, 8)
    expected = generate(base, inputs, max_new_tokens=17)
    assert (expected[0][:, 8:] == 7).all()
    assert torch.equal(generate(spec, inputs, max_new_tokens=17)[0], expected[0])
    assert spec.last_speculation.tau == 4.0
    assert spec.last_speculation.rounds == 4


def test_the_prompts_own_round_drafts_nothing_because_features_are_missing():
    spec = spec_model()
    generate(spec, prompts(6), max_new_tokens=5)
    assert [row.prefill_tokens for row in spec.last_speculation.rows] == [1]


def test_a_generation_does_not_remember_the_last_one():
    spec = spec_model()
    first = generate(spec, prompts(6), max_new_tokens=12)
    generate(spec, prompts(3, 5, seed=4), max_new_tokens=12)
    assert torch.equal(generate(spec, prompts(6), max_new_tokens=12)[0], first[0])


def test_a_tree_deeper_than_the_heads_is_trimmed_with_one_line(caplog):
    base = shared_model("llama")
    with caplog.at_level(logging.WARNING, logger="speclm"):
        proposer = MedusaProposer(random_heads(num_heads=2), target=base, tree="mc_sim_7b_63")
    assert len(caplog.records) == 1
    assert "25 of its 63 nodes are left out" in caplog.text
    assert proposer.config.depth == 2
    assert len(proposer.config.paths) == 38


@torch.no_grad()
def test_a_growing_tree_holds_the_likeliest_paths_of_each_row():
    base = shared_model("llama")
    heads = random_heads(num_heads=2, scale=1.0)
    proposer = MedusaProposer(heads, target=base, num_draft_tokens=5, min_probability=0.01)
    hidden = torch.randn(2, 3, HIDDEN, generator=torch.Generator().manual_seed(0))
    roots = torch.tensor([3, 4])
    proposer.begin(prefill(2))
    proposer.commit(Accepted.from_host([[0], [0]], [[3], [4]], device=CPU).with_features(hidden))
    draft = proposer.propose(roots, noise=None)
    distributions = heads(hidden[:, 0], lm_head=base.lm_head).softmax(-1)
    for row in range(2):
        first, second = (distributions[row, head].sort(descending=True) for head in range(2))
        probabilities = {(int(t),): float(p) for p, t in zip(*first, strict=True)}
        probabilities |= {
            (*path, int(t)): probability * float(p)
            for path, probability in list(probabilities.items())
            for p, t in zip(second.values[:9], second.indices[:9], strict=True)
        }
        wanted = sorted(probabilities, key=probabilities.get, reverse=True)[:5]
        wanted = {path for path in wanted if probabilities[path] >= 0.01}
        shape = row if len(draft.topology.parents) > 1 else 0
        found = {
            tuple(draft.tokens[row, [node for node in path if node > 0]].tolist())
            for path in draft.topology.path_indices[shape].tolist()
            if path[0] == 0 and path[1] > 0
        }
        assert found == wanted


def test_rows_that_were_given_nothing_get_no_nodes():
    base = shared_model("llama")
    proposer = MedusaProposer(random_heads(), target=base, min_probability=0.0, num_draft_tokens=4)
    hidden = torch.randn(2, 1, HIDDEN, generator=torch.Generator().manual_seed(0))
    proposer.begin(prefill(2))
    told = Accepted.from_host([[0], []], [[3], []], device=CPU).with_features(hidden)
    proposer.commit(told)
    draft = proposer.propose(torch.tensor([3, 4]), noise=None)
    assert draft.topology.host_sizes == [5, 1]


@pytest.mark.parametrize(
    ("options", "words"),
    [({"min_probability": 2.0}, "min_probability"), ({"num_draft_tokens": 0}, "num_")],
)
def test_options_out_of_range_are_named(options, words):
    base = shared_model("llama")
    with pytest.raises(OptionError, match=words):
        MedusaProposer(random_heads(), target=base, **options)


def test_drawn_drafts_keep_to_num_draft_tokens():
    spec = spec_model(num_draft_tokens=2)
    spec.generate(**prompts(6), max_new_tokens=12, do_sample=True, acceptance="rejection")
    (row,) = spec.last_speculation.rows
    assert 0 < row.num_draft_tokens <= 2 * len(row.accepted_lengths)


@pytest.mark.parametrize("kind", ["granitemoe", "cohere"])
def test_heads_without_matrix_work_where_logits_are_more_than_a_product(kind):
    shape = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": HIDDEN,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    if kind == "cohere":
        base = randomise(CohereForCausalLM(CohereConfig(**shape, logit_scale=0.5)))
    else:
        experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "logits_scaling": 2.0}
        base = randomise(GraniteMoeForCausalLM(GraniteMoeConfig(**shape, **experts)))
    decoder, own = base.get_decoder(), base.get_decoder().forward

    def wrapped(*arguments, **settings):
        return own(*arguments, **settings)

    decoder.forward = wrapped
    spec = SpecModel(base, MedusaProposer(random_heads(), target=base))
    expected = generate(base, prompts(6, 3), max_new_tokens=8)
    found = generate(spec, prompts(6, 3), max_new_tokens=8)
    assert torch.equal(found[0], expected[0])
    assert spec.last_speculation.fallbacks == []
    assert vars(decoder)["forward"] is wrapped


def test_num_draft_tokens_bounds_the_tree():
    base = shared_model("llama")
    proposer = MedusaProposer(random_heads(), target=base, tree=[3, 2], num_draft_tokens=4)
    assert proposer.config.paths == ((0,), (1,), (2,), (0, 0))


@pytest.mark.parametrize(
    ("heads", "tree", "error", "words"),
    [
        ({"vocab_size": 99}, None, VocabularyMismatchError, "99"),
        ({"hidden_size": 24}, None, OptionError, "24 wide"),
        ({}, [[VOCAB_SIZE]], OptionError, "rank 160"),
        ({}, [[0], [1, 0]], TopologyError, "prefix"),
    ],
)
def test_heads_or_trees_that_do_not_fit_are_named(heads, tree, error, words):
    base = shared_model("llama")
    with pytest.raises(error, match=words):
        MedusaProposer(random_heads(**heads), target=base, tree=tree)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"min_probability": "a"}, "min_probability is 'a', a str, expected a number"),
        ({"min_probability": None}, "min_probability is None, a NoneType, expected a number"),
        ({"num_draft_tokens": 2.5}, "num_draft_tokens is 2.5, a float, expected a whole number"),
        ({"num_draft_tokens": "a", "tree": [2]}, "num_draft_tokens is 'a', a str"),
        ({"heads": "org/heads"}, "heads is a str, expected MedusaHeads.*from_pretrained"),
    ],
)
def test_options_of_the_wrong_type_are_named(options, words, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as users run it
    with pytest.raises(OptionError, match=words):
        MedusaProposer(**{"heads": random_heads(), "target": shared_model("llama"), **options})
