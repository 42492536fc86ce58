"""The draft model's cache, what it drafts, and what it costs."""

from dataclasses import fields
from itertools import product
from typing import Any

import jaxtyping
import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from speclm import SpecModel
from speclm.acceptance import Accepted
from speclm.cache import CACHE_NAME
from speclm.drafting.interface import Prefill
from speclm.errors import OptionError, TreeBudgetError, VocabularyMismatchError
from speclm.methods.draft_model.network import DraftNetwork
from speclm.methods.draft_model.proposer import DraftModelConfig, DraftModelProposer
from tests.grids import turns
from tests.models import (
    VOCAB_SIZE,
    build_model,
    generate,
    prompts,
    randomise,
    shared_model,
)

TOLERANCE = 1e-5  # of values of about 1: sums over other shapes round differently in float32
CHAIN = {"width": 1, "branches": 1, "min_probability": 0.0, "min_confidence": 0.0}
WIDE = {"width": 3, "branches": 3, "num_draft_tokens": 12, "min_probability": 0.0}


@torch.no_grad()
def fresh_prefill(model: PreTrainedModel, tokens: Tensor) -> DynamicCache:
    cache = DynamicCache()
    model(input_ids=tokens[None], **{CACHE_NAME: cache}, use_cache=True)
    return cache


def require_cache_of(proposer: DraftModelProposer, output: Tensor, padding: list[int]) -> None:
    """Check that the cache holds a prefix of each row, as a prefill would leave it."""
    cache = proposer._cache
    for row, (length, start) in enumerate(zip(cache.host_lengths, padding, strict=True)):
        prefill = fresh_prefill(proposer.view.model, output[row, start:length])
        for found, wanted in zip(cache.layers, prefill.layers, strict=True):
            for one, other in ((found.keys, wanted.keys), (found.values, wanted.values)):
                difference = (one[row, :, start:length] - other[0]).abs().max()
                assert float(difference) <= TOLERANCE * max(1.0, float(other.abs().max()))


@pytest.mark.parametrize(
    ("options", "case"),
    turns(
        [CHAIN, WIDE, {}],
        tuple(
            product(
                [{"do_sample": True, "temperature": 0.8}, {"do_sample": False}],
                [(7, 3, 10), (9,)],
            )
        ),
    ),
)
def test_cache_equals_a_fresh_prefill_after_every_round(case, options, monkeypatch):
    cell, lengths = case
    target = shared_model("llama")
    draft = related_draft(target)
    inputs, settings = prompts(*lengths), {"max_new_tokens": 16, **cell}
    expected, _ = generate(target, inputs, **settings)
    padding = (inputs["attention_mask"] == 0).sum(1).tolist()
    proposer = DraftModelProposer(draft, target=target, **options)
    rounds, commit = [], DraftModelProposer.commit

    def checked(self: DraftModelProposer, accepted: Any) -> None:
        commit(self, accepted)
        for row, unseen in enumerate(self._unseen):  # the cache and what is unseen: the whole row
            first = self._cache.host_lengths[row]
            assert unseen == expected[row, first : first + len(unseen)].tolist()
        require_cache_of(self, expected, padding)
        rounds.append(accepted.accepted_length.max().item())

    monkeypatch.setattr(DraftModelProposer, "commit", checked)
    found, _ = generate(SpecModel(target, proposer), inputs, **settings)
    assert torch.equal(found, expected)
    assert any(rounds), "nothing was accepted: the check shows little"


@pytest.mark.parametrize("num_before", [0, 2])
@torch.no_grad()
def test_rounds_without_a_draft_cost_no_forward_and_are_caught_up_with(num_before):
    target = shared_model("llama")
    draft = related_draft(target)
    tokens = torch.randint(3, VOCAB_SIZE, (2, 14), generator=torch.Generator().manual_seed(0))
    paused, fresh = (DraftModelProposer(draft, target=target, **CHAIN) for _ in range(2))
    forwards: list[int] = []
    handle = draft.register_forward_hook(lambda *_: forwards.append(1))
    paused.begin(prompt_of(tokens[:, :8]))
    for index in range(8, 8 + num_before):
        paused.propose(tokens[:, index - 1], noise=None)
        paused.commit(one_token_a_row(tokens[:, index]))
    drafted = len(forwards)
    for index in range(8 + num_before, 14):
        paused.commit(one_token_a_row(tokens[:, index]))
    assert len(forwards) == drafted
    assert drafted > 0 or num_before == 0
    handle.remove()
    fresh.begin(prompt_of(tokens))
    found, wanted = (
        proposer.propose(tokens[:, -1], noise=None).tokens for proposer in (paused, fresh)
    )
    assert torch.equal(found, wanted)


def prompt_of(tokens: Tensor) -> Prefill:
    return Prefill(
        tokens=tokens[:, :-1],
        num_padding=torch.zeros(len(tokens), dtype=torch.long),
        first_tokens=tokens[:, -1],
        temperature=0.0,
        max_new_tokens=32,
    )


def one_token_a_row(tokens: Tensor) -> Accepted:
    return Accepted.from_host(
        [[0]] * len(tokens), [[token] for token in tokens.tolist()], device=tokens.device
    )


@torch.no_grad()
def related_draft(target: PreTrainedModel) -> PreTrainedModel:
    """Return a model that is often, but not always, of the target's opinion."""
    draft = build_model("llama")
    draft.load_state_dict(target.state_dict())
    generator = torch.Generator().manual_seed(3)
    for parameter in draft.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.add_(0.1 * parameter.std() * noise)
    return draft


@pytest.mark.parametrize(
    ("depth", "lengths", "family"), turns([1, 3, 6], [(9,), (7, 3, 10)], ["llama", "mistral"])
)
def test_target_as_its_own_draft_is_accepted_whole(family, lengths, depth):
    target = shared_model(family)
    proposer = DraftModelProposer(
        target, target=target, depth=depth, num_draft_tokens=depth, **CHAIN
    )
    spec = SpecModel(target, proposer)
    new = 4 * (depth + 1)  # the first of them in the prompt's own forward
    inputs = prompts(*lengths)
    expected, _ = generate(target, inputs, do_sample=False, max_new_tokens=new)
    found, _ = generate(spec, inputs, do_sample=False, max_new_tokens=new)
    assert torch.equal(found, expected)
    stats = spec.last_speculation
    assert [row.prefill_tokens for row in stats.rows] == [depth + 1] * len(lengths)
    assert stats.rounds == 3
    assert stats.tau == depth + 1
    assert stats.acceptance_by_depth == [1.0] * depth


def test_coupled_ranking_finds_more_than_half_of_sampled_tokens():
    target = shared_model("llama")
    proposer = DraftModelProposer(target, target=target, depth=3, num_draft_tokens=3, **CHAIN)
    spec = SpecModel(target, proposer)
    settings = {"do_sample": True, "top_k": 0, "max_new_tokens": 60}
    found, state = generate(spec, prompts(9, 5), **settings)
    expected, plain_state = generate(target, prompts(9, 5), **settings)
    assert torch.equal(found, expected)
    assert torch.equal(state, plain_state)
    assert spec.last_speculation.acceptance_by_depth[0] > 0.8


def begun(
    proposer: DraftModelProposer,
    *lengths: int,
    temperature: float = 0.0,
    eos_token_ids: frozenset[int] = frozenset(),
) -> Tensor:
    inputs = prompts(*lengths)
    roots = torch.arange(3, 3 + len(lengths))
    proposer.begin(
        Prefill(
            tokens=inputs["input_ids"],
            num_padding=(inputs["attention_mask"] == 0).sum(1),
            first_tokens=roots,
            temperature=temperature,
            max_new_tokens=20,
            eos_token_ids=eos_token_ids,
        )
    )
    return roots


@torch.no_grad()
def test_children_of_the_root_are_the_drafts_best_tokens():
    model = shared_model("llama")
    options = {"depth": 1, "branches": 3, "num_draft_tokens": 3, "min_probability": 0.0}
    proposer = DraftModelProposer(model, target=model, **options)
    roots = begun(proposer, 6, 4)
    draft = proposer.propose(roots, noise=None)
    inputs = prompts(6, 4)
    for row, length in enumerate((6, 4)):
        text = torch.cat([inputs["input_ids"][row, 6 - length :], roots[row : row + 1]])
        best = model(input_ids=text[None]).logits[0, -1].topk(3).indices
        assert draft.tokens[row].tolist() == [roots[row].item(), *best.tolist()]
    assert draft.topology.parents.tolist() == [[0, 0, 0, 0]]  # of both rows


@pytest.mark.parametrize("num_draft_tokens", [1, 4, 9])
@torch.no_grad()
def test_drafts_stay_within_their_bounds(num_draft_tokens):
    model = shared_model("llama")
    options = {**WIDE, "num_draft_tokens": num_draft_tokens, "depth": 4, "min_confidence": 0.0}
    proposer = DraftModelProposer(model, target=model, **options)
    draft = proposer.propose(begun(proposer, 6, 3), noise=None)
    assert draft.topology.num_nodes == num_draft_tokens + 1
    assert draft.topology.max_depth <= 4


@torch.no_grad()
def test_unlikely_nodes_are_not_drafted():
    model = shared_model("llama")
    proposer = DraftModelProposer(model, target=model, min_probability=1.0)
    draft = proposer.propose(begun(proposer, 6), noise=None)
    assert draft.tokens.tolist() == [[3]]


@torch.no_grad()
def test_no_confidence_means_no_draft_forward_beyond_the_prompt_or_the_roots(monkeypatch):
    model = shared_model("llama")
    proposer = DraftModelProposer(model, target=model, min_confidence=1.0, min_probability=0.0)
    roots = begun(proposer, 6)
    forwards = []
    original = DraftNetwork.forward
    monkeypatch.setattr(
        DraftNetwork, "forward", lambda *args, **more: forwards.append(1) or original(*args, **more)
    )
    draft = proposer.propose(roots, noise=None)
    assert draft.topology.max_depth == 1
    assert forwards == []  # the prompt's own forward gave what follows the root
    proposer.commit(Accepted.from_host([[0]], [[5]], device=roots.device))
    assert proposer.propose(torch.tensor([5]), noise=None).topology.max_depth == 1
    assert forwards == [1]


@torch.no_grad()
def test_a_level_is_drafted_while_most_rows_grow():
    model = shared_model("llama")
    options = {"min_probability": 0.0, "branches": 1, "depth": 3}

    def depths(**more):
        proposer = DraftModelProposer(model, target=model, **options, **more)
        draft = proposer.propose(begun(proposer, 6, 9, 7, 8), noise=None)
        found = draft.topology.host_depths
        return found * (4 // len(found))  # rows of one shape share it

    inputs = prompts(6, 9, 7, 8)
    tokens = torch.cat([inputs["input_ids"], torch.arange(3, 7)[:, None]], dim=1)
    mask = torch.cat([inputs["attention_mask"], torch.ones(4, 1, dtype=torch.long)], dim=1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(input_ids=tokens, attention_mask=mask, position_ids=positions).logits
    distribution = logits[:, -1].softmax(-1).amax(-1)
    middle = float(distribution.median())  # the lower of the two in the middle
    confident = [float(probability) >= middle * 1.0001 for probability in distribution]
    assert confident.count(True) == 2
    assert depths(min_confidence=middle * 1.0001) == [1, 1, 1, 1]
    mixed = depths(min_confidence=middle * 1.0001, min_growing=0.5)
    assert [depth > 1 for depth in mixed] == confident


@pytest.mark.parametrize("options", [CHAIN, {**WIDE, "min_confidence": 0.0}])
@torch.no_grad()
def test_nothing_is_fed_or_drafted_below_an_end_token(options, monkeypatch):
    model = shared_model("llama")
    proposer = DraftModelProposer(model, target=model, **options)
    free = proposer.propose(begun(proposer, 6), noise=None)
    end = free.tokens[0, free.topology.parents[0].tolist().index(1)].item()  # at depth 2
    roots = begun(proposer, 6, eos_token_ids=frozenset({end, 9999}))
    fed: list[int] = []
    original = DraftNetwork.forward

    def forward(network: DraftNetwork, tokens: Tensor, *args: Any, **more: Any) -> Tensor:
        fed.extend(tokens.flatten().tolist())
        return original(network, tokens, *args, **more)

    monkeypatch.setattr(DraftNetwork, "forward", forward)
    draft = proposer.propose(roots, noise=None)
    tokens, parents = draft.tokens[0].tolist(), draft.topology.parents[0].tolist()
    ends = [node for node, token in enumerate(tokens) if token == end]
    assert ends, "an end token is still drafted"
    assert not any(parents[node] in ends for node in range(len(tokens)))
    assert end not in fed


def short_draft(kind: str) -> PreTrainedModel:
    if kind == "rotary":
        return build_model("llama", seed=7, max_position_embeddings=24)
    shape = {"vocab_size": VOCAB_SIZE, "n_embd": 40, "n_layer": 2, "n_head": 4}
    special = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    return randomise(GPT2LMHeadModel(GPT2Config(**shape, **special, n_positions=24)))


@pytest.mark.parametrize(
    ("kind", "settings"), turns(["rotary", "learned"], [{"do_sample": False}, {"do_sample": True}])
)
def test_draft_model_with_few_positions_falls_silent_and_the_target_goes_on(kind, settings):
    target = shared_model("llama")
    proposer = DraftModelProposer(short_draft(kind), target=target, depth=6, **WIDE)
    spec = SpecModel(target, proposer)
    for lengths in ((16, 12), (30,), (10,)):
        found = generate(spec, prompts(*lengths), max_new_tokens=20, **settings)
        expected = generate(target, prompts(*lengths), max_new_tokens=20, **settings)
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])
        assert (spec.last_speculation.total.num_draft_tokens > 0) == (max(lengths) < 24)


def test_another_vocabulary_is_refused_and_both_models_are_named():
    draft = build_model("llama", vocab_size=90)
    draft.config._name_or_path = "org/draft"
    words = (
        r"org/draft has a vocabulary of 90, the target LlamaForCausalLM one of 160, .* tokenizer"
    )
    with pytest.raises(VocabularyMismatchError, match=words):
        DraftModelProposer(draft, target=shared_model("llama"))


@pytest.mark.parametrize(
    ("option", "value", "error"),
    [
        ("depth", 0, TreeBudgetError),
        ("depth", 65, TreeBudgetError),
        ("num_draft_tokens", 0, OptionError),
        ("num_draft_tokens", 512, OptionError),
        ("width", 0, OptionError),
        ("branches", 0, OptionError),
        ("min_probability", 1.5, OptionError),
        ("min_confidence", -0.1, OptionError),
    ],
)
def test_option_out_of_range_is_refused(option, value, error):
    with pytest.raises(error, match=option):
        DraftModelConfig(**{option: value})


@pytest.mark.parametrize(
    "name", [field.name for field in fields(DraftModelConfig) if field.name != "paths"]
)
def test_options_of_the_wrong_type_are_named(name, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as users run it
    model = shared_model("llama")
    wrong_ones = ("a", [0.5]) if name == "mixture" else ("a", None, [0.5])
    for wrong in wrong_ones:
        with pytest.raises(OptionError, match=f"{name} is .*, a {type(wrong).__name__}, expected"):
            DraftModelProposer(model, target=model, **{name: wrong})


def test_unknown_option_is_named_with_the_known_ones():
    model = shared_model("llama")
    with pytest.raises(
        OptionError, match=r"unknown option 'min_share', expected.*'min_confidence'"
    ):
        DraftModelProposer(model, target=model, min_share=0.1)
