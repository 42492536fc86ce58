"""Targets that take only chains keep their tokens, whoever drafts and whatever is asked."""

from collections.abc import Callable
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedModel, StoppingCriteriaList

from speclm import SpecModel
from speclm.acceptance import RejectionRule
from speclm.adaptive.pausing import Pausing
from speclm.methods.draft_model.chain_proposer import ChainDraftProposer
from speclm.methods.draft_model.proposer import DraftModelProposer
from speclm.methods.ngram.proposer import NgramProposer
from speclm.self_check.verdict import Verification
from speclm.target.chain_session import MAX_UNREAD
from speclm.testing import ScriptedProposer
from tests.callbacks import CountsCalls, DrawsAtEachCall, EndsRows, Tokens
from tests.families import shared_family
from tests.grids import grid, turns
from tests.models import VOCAB_SIZE, build_model, generate, prompts, shared_model
from tests.outcomes import Outcome, observe, reading, require_close, require_same
from tests.proposers import DEPTH, PROPOSERS, WRONG_AT, build_proposer
from tests.settings import tokenizer

BY_SLOT, HYBRID = "bloom", "qwen3_next"
FAMILIES = (BY_SLOT, HYBRID)
OTHERS = ("mamba2", "falcon_h1", "lfm2", "llama4_text")
NEW_TOKENS = 14
GREEDY = {"do_sample": False}
SAMPLED = {"do_sample": True, "temperature": 0.9, "top_k": 0}
ENDS = list(range(1, 24))  # about one token in seven: rows end early, late and not at all
LENGTHS = {"one row": (9,), "padded rows": (7, 1, 10)}


def target(name: str) -> PreTrainedModel:
    return shared_model(name) if name in FAMILIES else shared_family(name)


@cache
def spec_of(name: str) -> SpecModel:
    """Return a wrapped model; give it a proposer before every call."""
    return SpecModel(target(name), None)


def compare(
    name: str,
    inputs: dict[str, Tensor],
    build: Callable[[], dict[str, Any]],
    *,
    kind: str = "scripted",
) -> tuple[Outcome, Outcome, SpecModel]:
    """Decode without and with drafts; require equal tokens and an equal generator."""
    base, spec = target(name), spec_of(name)
    expected = observe(base, inputs, {"max_new_tokens": NEW_TOKENS, **build()}, base=base)
    width = inputs["input_ids"].shape[1] if "input_ids" in inputs else 0
    reference = expected.sequences[:, width:].tolist()
    spec.proposer = build_proposer(kind, reference, target=base, draft=shared_model("llama", 1))
    found = observe(spec, inputs, {"max_new_tokens": NEW_TOKENS, **build()}, base=base)
    require_same(found, expected)
    assert spec.self_check.verification is Verification.CHAINS
    assert spec.last_speculation.fallbacks == []
    return found, expected, spec


SETTINGS: dict[str, Callable[[], dict[str, Any]]] = {
    "greedy": lambda: GREEDY,
    "sampled": lambda: SAMPLED,
    "early ends": lambda: {**GREEDY, "eos_token_id": ENDS},
    "early ends, sampled": lambda: {**SAMPLED, "eos_token_id": ENDS, "pad_token_id": 159},
    "repetition penalty": lambda: {**GREEDY, "repetition_penalty": 1.4},
    "no repeated pairs, sampled": lambda: {**SAMPLED, "no_repeat_ngram_size": 2},
    "least length": lambda: {**GREEDY, "eos_token_id": ENDS, "min_new_tokens": 6},
    "one token": lambda: {**SAMPLED, "max_new_tokens": 1},
    "two tokens": lambda: {**GREEDY, "max_new_tokens": 2},
    "several sequences": lambda: {**SAMPLED, "num_return_sequences": 2},
    "a processor that counts": lambda: {
        **GREEDY,
        "logits_processor": LogitsProcessorList([CountsCalls()]),
    },
    "a processor that draws": lambda: {
        **SAMPLED,
        "logits_processor": LogitsProcessorList([DrawsAtEachCall()]),
    },
    "a criterion": lambda: {**SAMPLED, "stopping_criteria": StoppingCriteriaList([EndsRows()])},
}


@pytest.mark.parametrize(("setting", "case"), turns(SETTINGS, tuple(product(LENGTHS, FAMILIES))))
def test_every_setting_gives_the_tokens_of_regular_generation(setting, case):
    lengths, name = case
    compare(name, prompts(*LENGTHS[lengths]), SETTINGS[setting])


@pytest.mark.parametrize("name", FAMILIES)
def test_prompts_of_one_token_do_too(name):
    compare(name, prompts(1), SETTINGS["several sequences"])
    compare(name, prompts(1, 1), SETTINGS["greedy"])
    compare(name, prompts(1, 1), SETTINGS["early ends, sampled"])


@pytest.mark.parametrize("name", OTHERS)
def test_other_families_do_too(name):
    compare(name, prompts(7, 1, 10), SETTINGS["early ends, sampled"])
    compare(name, prompts(7, 1, 10), SETTINGS["repetition penalty"])


# A twin of a model that takes only chains drafts no trees; `ChainDraftProposer` is for it.
KINDS = [kind for kind in PROPOSERS if kind != "twin draft"]
MODES = ("greedy", "early ends, sampled")
TARGETS = tuple(product(FAMILIES, MODES))


@pytest.mark.parametrize(("kind", "case"), turns(KINDS, TARGETS))
def test_every_proposer_gives_the_tokens_of_regular_generation(case, kind):
    name, setting = case
    inputs = prompts(7, 1, 10)
    found, expected, _ = compare(name, inputs, SETTINGS[setting], kind=kind)
    assert found.num_forwards <= expected.num_forwards
    if kind in {"scripted", "Medusa that hits", "joined"}:
        assert found.num_forwards < expected.num_forwards


@pytest.mark.parametrize(
    ("name", "lengths"),
    grid(
        product([*FAMILIES, *OTHERS], [(9,), (6, 3)]),
        runs=lambda name, lengths: lengths == (6, 3),
    ),
)
def test_forwards_are_as_few_as_the_draft_allows(name, lengths):
    _, _, spec = compare(name, prompts(*lengths), lambda: {**GREEDY, "max_new_tokens": 24})
    stats = spec.last_speculation
    # Each wrong token ends a round; one more may be spent on catching up.
    assert stats.rounds <= -(-(24 - 1) // (DEPTH + 1)) + len(WRONG_AT) + 1
    assert stats.tau > 2


@pytest.mark.parametrize("name", FAMILIES)
def test_rounds_to_catch_up_are_forwards_that_count_and_draft_nothing(name, monkeypatch):
    asked: list[int] = []  # which starts the clock of a round, whether it drafts or not
    monkeypatch.setattr(Pausing, "wants_draft", lambda _: not asked.append(1))
    booked: list[bool] = []  # catching up is a cost of drafts, and no round of regular generation
    monkeypatch.setattr(Pausing, "record", lambda _, *, drafted, **others: booked.append(drafted))
    base, spec, inputs = target(name), spec_of(name), prompts(9)
    plain = base.generate(**inputs, **GREEDY, max_new_tokens=40)[0, 9:].tolist()
    # One token is right and the next one wrong, so that a recurrent model reads most tokens twice.
    spec.proposer = ScriptedProposer([plain], depth=2, wrong_at=range(2, 40, 2))
    fed: list[int] = []
    handle = base.get_input_embeddings().register_forward_hook(
        reading(lambda _, given, __: fed.append(given[0].shape[1]))
    )
    found = spec.generate(**inputs, **GREEDY, max_new_tokens=40)
    handle.remove()
    assert found[0, 9:].tolist() == plain
    stats = spec.last_speculation
    assert len(fed) == 1 + stats.rounds
    assert len(asked) == stats.rounds
    num_behind = sum(num_tokens > MAX_UNREAD + 1 for num_tokens in fed)
    assert (num_behind > 0) == (name == HYBRID)
    assert max(fed[1:]) <= MAX_UNREAD + 1 + 2 + 1  # owed, the root, the draft
    drafted = stats.rounds - stats.rows[0].offered[0]
    assert drafted <= num_behind + 1
    assert booked.count(False) <= 1  # the last one, which has no room for a draft


@pytest.mark.parametrize("name", FAMILIES)
def test_scores_logits_and_streamed_tokens_are_those_of_regular_generation(name):
    inputs = prompts(7, 1, 10)
    streamers = []

    def settings() -> dict[str, Any]:
        details = {"output_scores": True, "output_logits": True, "return_dict_in_generate": True}
        return {**SAMPLED, **details, "eos_token_id": ENDS, "top_p": 0.9}

    found, expected, _ = compare(name, inputs, settings)
    require_close(found.scores, expected.scores)
    require_close(found.logits, expected.logits)

    def streamed() -> dict[str, Any]:
        streamers.append(Tokens())
        return {**SAMPLED, "streamer": streamers[-1]}

    compare(name, prompts(8), streamed)
    assert streamers[0].calls == streamers[1].calls


@pytest.mark.parametrize("name", FAMILIES)
def test_stop_strings_end_rows_where_regular_generation_ends_them(name):
    base = build_model(name, vocab_size=len(tokenizer()))
    spec = SpecModel(base, None)
    inputs = prompts(6, 9, vocab_size=len(tokenizer()))
    free = base.generate(**inputs, **GREEDY, max_new_tokens=NEW_TOKENS)[:, 9:].tolist()
    word = tokenizer().decode(free[0][6:8])
    settings = {**GREEDY, "stop_strings": [word], "tokenizer": tokenizer()}
    expected = generate(base, inputs, max_new_tokens=NEW_TOKENS, **settings)
    spec.proposer = ScriptedProposer(free, depth=DEPTH, wrong_at=WRONG_AT)
    found = generate(spec, inputs, max_new_tokens=NEW_TOKENS, **settings)
    assert found[0].tolist() == expected[0].tolist()
    assert spec.last_speculation.fallbacks == []


@pytest.mark.parametrize("with_tokens", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_embeddings_give_what_their_tokens_give(name, with_tokens):
    inputs = prompts(7, 4)
    embeddings = target(name).get_input_embeddings()(inputs["input_ids"]).detach()
    given = {"inputs_embeds": embeddings, "attention_mask": inputs["attention_mask"]}
    if with_tokens:
        given["input_ids"] = inputs["input_ids"]
    compare(name, given, SETTINGS["sampled"])


@pytest.mark.parametrize("rule", ["typical", "rejection"])
@pytest.mark.parametrize("name", FAMILIES)
def test_rules_that_draw_decide_chains_and_end_rows_where_they_should(name, rule):
    spec, unused = spec_of(name), VOCAB_SIZE - 1
    spec.proposer = DraftModelProposer(
        shared_model("llama", 1), target=target(name), num_draft_tokens=5, width=2, branches=2
    )
    inputs = prompts(9, 3, 6)
    settings = {"eos_token_id": ENDS, "pad_token_id": unused, "suppress_tokens": [unused]}
    output, _ = generate(spec, inputs, **SAMPLED, max_new_tokens=20, **settings, acceptance=rule)
    stats = spec.last_speculation
    assert stats.fallbacks == []
    assert stats.acceptance.startswith(rule)
    assert stats.is_lossy == (rule == "typical")
    assert torch.equal(output[:, :9], inputs["input_ids"])
    for row in output[:, 9:].tolist():
        length = row.index(unused) if unused in row else len(row)
        assert set(row[length:]) <= {unused}
        assert not set(row[: length - 1]) & set(ENDS)
        assert length == output.shape[1] - 9 or row[length - 1] in ENDS


@pytest.mark.parametrize("name", FAMILIES)
def test_rejection_keeps_all_that_the_target_itself_would_draw(name):
    base, spec = target(name), spec_of(name)
    spec.proposer = ChainDraftProposer(build_model(name), target=base, num_draft_tokens=4)
    output, _ = generate(
        spec, prompts(8, 5), **SAMPLED, max_new_tokens=21, acceptance=RejectionRule("block")
    )
    assert output.shape[1] == 29
    assert spec.last_speculation.tau > 3


@pytest.mark.parametrize("name", FAMILIES)
def test_rules_leave_to_regular_generation_what_they_cannot_decide(name):
    spec = spec_of(name)
    spec.proposer = NgramProposer()
    inputs, settings = prompts(6), {**SAMPLED, "repetition_penalty": 1.3, "max_new_tokens": 6}
    expected = generate(target(name), inputs, **settings)[0]
    assert torch.equal(generate(spec, inputs, **settings, acceptance="typical")[0], expected)
    assert "reads the text" in spec.last_speculation.fallbacks[0]
