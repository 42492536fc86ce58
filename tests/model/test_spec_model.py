"""What a user of `SpecModel` meets: delegation, bad input, errors in the midst, several models."""

import logging
from typing import Any

import jaxtyping
import pytest
import torch
from jaxtyping import Int
from torch import Tensor
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    DynamicCache,
    FalconMambaConfig,
    FalconMambaForCausalLM,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    StaticCache,
)
from typing_extensions import override

from speclm import SpecModel, SpeculativeOutput
from speclm.acceptance import Accepted
from speclm.cache import CACHE_NAME
from speclm.config import ProposerConfig
from speclm.drafting.interface import Draft, Prefill, Proposer
from speclm.errors import (
    CacheError,
    DraftError,
    NumericalError,
    OptionError,
    PromptError,
    SpeclmError,
    TreeBudgetError,
    UnsupportedModelError,
)
from speclm.methods.draft_model.proposer import DraftModelProposer
from speclm.methods.ngram.proposer import NgramProposer
from speclm.sampling import PositionNoise
from speclm.self_check.verdict import Verification
from speclm.testing import ScriptedProposer
from speclm.tree.topology import chain, from_parents
from tests.models import VOCAB_SIZE, build_model, generate, prompts, randomise, shared_model

SAMPLED = {"do_sample": True, "max_new_tokens": 10}


class BrokenProposer(Proposer):
    """Returns or raises what it is given in one round, and drafts nothing in the others."""

    def __init__(self, outcome: Draft | BaseException, *, at_round: int = 0) -> None:
        self.config = ProposerConfig()
        self._outcome, self._at_round, self._round = outcome, at_round, 0

    @override
    def begin(self, prompt: Prefill) -> None:
        self._round = 0

    @override
    def propose(self, roots: Int[Tensor, " batch"], *, noise: PositionNoise | None) -> Draft:
        if noise is not None:
            noise.at_depth(3)  # the generator runs ahead of regular generation
        self._round += 1
        if self._round - 1 != self._at_round:
            return Draft(tokens=roots[:, None], topology=chain(0))
        if isinstance(self._outcome, BaseException):
            raise self._outcome
        return self._outcome

    @override
    def commit(self, accepted: Accepted) -> None:
        """Needs no state."""


@pytest.fixture
def base() -> PreTrainedModel:
    return shared_model("llama")


@pytest.fixture
def spec(base: PreTrainedModel) -> SpecModel:
    return SpecModel(base, NgramProposer())


def require_identical(spec: SpecModel, inputs: dict[str, Tensor], **settings: Any) -> None:
    expected, state = generate(spec.base, inputs, **settings)
    found, state_found = generate(spec, inputs, **settings)
    assert torch.equal(found, expected)
    assert torch.equal(state_found, state)


def right_padded() -> dict[str, Tensor]:
    return {key: value.flip(1) for key, value in prompts(6, 3).items()}


def static_cache() -> StaticCache:
    """Return a cache that forgets what is before a window."""
    return StaticCache(config=shared_model("mistral").config, max_cache_len=32)


@pytest.mark.parametrize(
    ("inputs", "error", "words"),
    [
        ({"input_ids": torch.zeros(0, 4, dtype=torch.long)}, PromptError, "at least one row"),
        ({"input_ids": torch.zeros(2, 0, dtype=torch.long)}, PromptError, "one token"),
        ({"input_ids": torch.zeros(4, dtype=torch.long)}, PromptError, r"\[batch, seq\]"),
        (right_padded(), PromptError, "padded on the right.*left padding"),
        (prompts(520), PromptError, "520 tokens.*max_position_embeddings 512.*truncation"),
    ],
)
@pytest.mark.parametrize("sampled", [True, False])
def test_bad_prompt_is_refused(spec, inputs, error, words, sampled):
    state = torch.get_rng_state()
    with pytest.raises(error, match=words) as caught:
        spec.generate(**inputs, do_sample=sampled, max_new_tokens=2)
    assert isinstance(caught.value, SpeclmError)
    assert isinstance(caught.value, ValueError)
    assert torch.equal(torch.get_rng_state(), state)


def test_positional_prompt_is_checked_too(spec):
    padded = right_padded()
    with pytest.raises(PromptError, match="padded on the right"):
        spec.generate(padded["input_ids"], attention_mask=padded["attention_mask"])


def test_static_cache_with_a_window_is_refused(spec):
    with pytest.raises(CacheError, match=r"StaticCache.*rolled back.*DynamicCache") as caught:
        spec.generate(**prompts(4), **{CACHE_NAME: static_cache()}, max_new_tokens=2)
    assert isinstance(caught.value, TypeError)


@pytest.mark.parametrize(
    "arguments",
    [
        {"assistant_model": shared_model("llama", 7)},
        {"prompt_lookup_num_tokens": 3},
        {"custom_generate": "some/repository"},
        {"generation_config": GenerationConfig(prompt_lookup_num_tokens=3)},
    ],
)
def test_other_speculation_is_refused(spec, arguments):
    with pytest.raises(OptionError, match=r"(own speculation|decoding loop).*\.base\.generate"):
        spec.generate(**prompts(4), max_new_tokens=2, **arguments)


@pytest.mark.parametrize("base", ["a string", torch.nn.Linear(2, 2), None])
def test_base_that_is_no_model_is_refused(base, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as users run it
    with pytest.raises(UnsupportedModelError, match="AutoModelForCausalLM"):
        SpecModel(base, None)


@pytest.mark.parametrize(
    ("draft", "error", "words"),
    [
        (
            Draft(torch.zeros(1, 600, dtype=torch.long), chain(1), None),
            TreeBudgetError,
            "600 nodes.*at most 512",
        ),
        (Draft(torch.zeros(2, 2, dtype=torch.long), chain(1), None), DraftError, "expected 1 rows"),
        (Draft(torch.zeros(1, 3, dtype=torch.long), chain(1), None), DraftError, "one parent"),
        (Draft(torch.zeros(1, 2, dtype=torch.int32), chain(1), None), DraftError, "int32"),
    ],
)
def test_draft_of_the_wrong_shape_is_refused(base, draft, error, words):
    broken = SpecModel(base, BrokenProposer(draft, at_round=1))
    with pytest.raises(error, match=words):
        broken.generate(**prompts(4), **SAMPLED)


@pytest.mark.parametrize("parents", [[0] * 600, list(range(-1, 80))])
def test_tree_beyond_the_budget_cannot_be_built(parents):
    with pytest.raises(TreeBudgetError, match="at most"):
        from_parents([[0, *parents[1:]]], device=torch.device("cpu"))


@pytest.mark.parametrize("settings", [SAMPLED, {"do_sample": False, "max_new_tokens": 10}])
@pytest.mark.parametrize("batch", [1, 2])
def test_nan_logits_name_float16_overflow_and_bfloat16(settings, batch):
    model = build_model("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight[7] = torch.nan
    broken = SpecModel(model, NgramProposer())
    inputs = prompts(*[5, 4][:batch])
    inputs["input_ids"][-1, -1] = 7  # one row of the batch is enough
    with pytest.raises(NumericalError, match=r"NaN.*float16.*overflow.*bfloat16") as caught:
        broken.generate(**inputs, **settings)
    assert isinstance(caught.value, ArithmeticError)


def test_nan_in_float16_says_to_load_in_bfloat16():
    model = build_model("llama").half()
    broken = SpecModel(model, NgramProposer())
    with torch.no_grad():  # behind the self-check
        model.get_output_embeddings().weight[:] = torch.nan
    with pytest.raises(NumericalError, match=r"65504: load the model with dtype=torch\.bfloat16"):
        broken.generate(**prompts(4), **SAMPLED)


@pytest.mark.usefixtures("no_verdicts")
def test_model_whose_logits_are_nan_when_loaded_decodes_plainly_and_names_the_remedy():
    model = build_model("llama").half()
    with torch.no_grad():
        model.get_output_embeddings().weight[:] = torch.nan
    broken = SpecModel(model, NgramProposer())
    require_identical(broken, prompts(4), do_sample=False, max_new_tokens=3)
    assert "dtype=torch.bfloat16" in broken.last_speculation.fallbacks[0]


@pytest.mark.parametrize("interruption", [RuntimeError("no"), KeyboardInterrupt()])
@pytest.mark.parametrize("at_round", [0, 2])
@pytest.mark.parametrize("settings", [SAMPLED, {"do_sample": False, "max_new_tokens": 10}])
def test_interrupted_generation_leaves_everything_usable(base, interruption, at_round, settings):
    inputs = prompts(6, 3)
    before = base.config._attn_implementation
    spec = SpecModel(base, BrokenProposer(interruption, at_round=at_round))
    torch.manual_seed(3)
    with pytest.raises(type(interruption)):
        spec.generate(**inputs, **settings)
    state = torch.get_rng_state()
    torch.manual_seed(3)  # the generator stands where regular generation would after as many tokens
    if at_round > 0:  # at 0 the prompt's own forward has not run, and no row holds a token
        base.generate(**inputs, **{**settings, "max_new_tokens": at_round})
    assert torch.equal(torch.get_rng_state(), state)
    assert base.config._attn_implementation == before
    assert not base.training
    spec.proposer = NgramProposer()
    require_identical(spec, inputs, **settings)


def test_nan_in_a_later_round_leaves_everything_usable():
    model = build_model("llama")
    inputs = prompts(5)
    expected, _ = generate(model, inputs, **SAMPLED)
    third = int(expected[0, 5 + 3])
    spec = SpecModel(model, ScriptedProposer([expected[0, 5:].tolist()], depth=2))
    weight = model.get_input_embeddings().weight
    kept = weight[third].detach().clone()
    with torch.no_grad():
        weight[third] = torch.nan
    with pytest.raises(NumericalError):
        generate(spec, inputs, **SAMPLED)
    with torch.no_grad():
        weight[third] = kept
    assert model.config._attn_implementation == "sdpa"
    require_identical(spec, inputs, **SAMPLED)
    assert torch.equal(generate(model, inputs, **SAMPLED)[0], expected)


def test_return_dict_holds_sequences_and_counters(spec, base):
    inputs = prompts(6, 3)
    output, _ = generate(spec, inputs, return_dict_in_generate=True, **SAMPLED)
    assert isinstance(output, SpeculativeOutput)
    assert torch.equal(output.sequences, generate(base, inputs, **SAMPLED)[0])
    assert output.speculation is spec.last_speculation
    assert output.speculation.rounds > 0
    assert output.speculation.verification == "tree attention"
    config = GenerationConfig(return_dict_in_generate=True, **SAMPLED, pad_token_id=0)
    assert isinstance(spec.generate(**inputs, generation_config=config), SpeculativeOutput)


def test_two_models_on_one_base_in_turn(base):
    first = SpecModel(base, NgramProposer())
    second = SpecModel(base, DraftModelProposer(shared_model("llama", 7), target=base))
    for _ in range(2):
        for spec in (first, second):
            require_identical(spec, prompts(8, 5), **SAMPLED)
            assert spec.last_speculation.fallbacks == []


def test_same_model_as_base_and_draft(base):
    spec = SpecModel.from_pretrained(base, base)
    require_identical(spec, prompts(8, 5), do_sample=False, max_new_tokens=20)
    assert spec.last_speculation.tau > 2
    require_identical(spec, prompts(8, 5), do_sample=True, max_new_tokens=20)


def test_report_names_what_is_wrapped_and_the_last_call(spec):
    lines: list[str] = []
    spec.print_report(write=lines.append)
    text = "\n".join(lines)
    for word in ("LlamaForCausalLM", "NgramProposer", "tree attention", "self-check passed"):
        assert word in text
    assert "last call" not in text
    spec.generate(**prompts(6), max_new_tokens=6, do_sample=False)
    spec.print_report(write=lines.append)
    assert "tau" in "\n".join(lines)
    assert "pauses" not in "\n".join(lines)
    spec.last_speculation.num_plain_rounds = 2
    spec.print_report(write=lines.append)
    assert "2 of" in lines[-1]
    assert "rounds without a draft" in lines[-1]
    spec.generate(**prompts(6), max_new_tokens=6, num_beams=2)
    lines.clear()
    spec.print_report(write=lines.append)
    assert "regular generation: num_beams=2" in lines[-1]


def test_report_prints_by_default(base, capsys):
    SpecModel(base, None).print_report()
    assert "proposer    none" in capsys.readouterr().out


def test_completion_offers_public_names_of_ours_and_of_the_base(spec, base):
    names = dir(spec)
    assert {"print_report", "last_speculation", "proposer", "generate", "forward"} <= set(names)
    assert {name for name in dir(base) if not name.startswith("_")} <= set(names)
    assert [name for name in names if name.startswith("_") and not name.startswith("__")] == []
    assert len(names) == len(set(names))


def test_attributes_are_the_base_models(spec, base):
    assert spec.base is base
    assert spec.config is base.config
    assert spec.generation_config is base.generation_config
    assert (spec.device, spec.dtype) == (base.device, base.dtype)


TINY = {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "eos_token_id": None, "pad_token_id": 0}


def lines_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "speclm"]


def report_of(spec: SpecModel) -> str:
    written: list[str] = []
    spec.print_report(write=written.append)
    return "\n".join(written)


def test_model_that_takes_chains_alone_speculates_and_says_so_once(caplog):
    model = randomise(BloomForCausalLM(BloomConfig(**TINY, n_layer=2, n_head=4)))
    inputs = prompts(6, 3)
    expected = generate(model, inputs, **SAMPLED)[0][:, 6:].tolist()
    spec = SpecModel(model, ScriptedProposer(expected, depth=4))
    assert spec.self_check.verification is Verification.CHAINS
    with caplog.at_level(logging.WARNING, logger="speclm"):
        for _ in range(2):
            require_identical(spec, inputs, **SAMPLED)
    lines = lines_of(caplog)
    assert len(lines) == 1
    assert "verifying chains with BloomForCausalLM" in lines[0]
    assert spec.last_speculation.verification == "chains"
    assert spec.last_speculation.fallbacks == []
    assert spec.last_speculation.rounds < len(expected[0]) / 2
    assert "no trees: " in report_of(spec)


def test_model_that_takes_no_draft_decodes_plainly_and_says_so_once(caplog):
    config = FalconMambaConfig(**TINY, num_hidden_layers=2, state_size=4)
    model = randomise(FalconMambaForCausalLM(config))
    spec = SpecModel(model, NgramProposer())
    assert spec.self_check.verification is Verification.REGULAR
    with caplog.at_level(logging.WARNING, logger="speclm"):
        for _ in range(2):
            require_identical(spec, prompts(6, 3), **SAMPLED)
    lines = lines_of(caplog)
    assert len(lines) == 1
    assert "FalconMambaForCausalLM" in lines[0]
    assert spec.last_speculation.fallbacks == [spec.self_check.reason]
    assert "regular generation" in report_of(spec)


def test_model_in_training_mode_decodes_plainly(caplog):
    model = build_model("llama", attention_dropout=0.2).train()
    spec = SpecModel(model, NgramProposer())
    assert model.training
    require_identical(spec, prompts(6), **SAMPLED)
    assert "training mode" in spec.last_speculation.fallbacks[0]
    assert model.training


def test_empty_dynamic_cache_changes_nothing(spec, base):
    expected = base.generate(**prompts(6), max_new_tokens=6, do_sample=False)
    found = spec.generate(
        **prompts(6), max_new_tokens=6, do_sample=False, **{CACHE_NAME: DynamicCache()}
    )
    assert torch.equal(found, expected)


def test_int32_prompt_gives_the_dtype_of_plain_decoding(base):
    tokens = prompts(6)["input_ids"].int()
    mask = torch.ones_like(tokens)
    settings = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
    expected = base.generate(tokens, **settings)
    found = SpecModel.from_pretrained(base, "ngram").generate(tokens, **settings)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["stats", "target", "proposer"])
def test_keyword_of_the_loop_is_as_unknown_as_to_plain_decoding(base, name):
    with pytest.raises(ValueError, match="not used by the model"):
        SpecModel.from_pretrained(base, None).generate(**prompts(4), **{name: 3})


def test_last_learned_position_may_be_that_of_the_last_token_but_one():
    config = GPT2Config(
        n_embd=32,
        n_layer=2,
        n_head=2,
        vocab_size=64,
        n_positions=20,
        bos_token_id=1,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config).eval()
    tokens = torch.arange(2, 8).repeat(2)[None]
    settings = {"max_new_tokens": 9, "do_sample": False, "attention_mask": torch.ones_like(tokens)}
    expected = model.generate(tokens, **settings)
    proposer = ScriptedProposer(expected[:, 12:].tolist(), depth=6, wrong_at=(2,))
    assert torch.equal(SpecModel(model, proposer).generate(tokens, **settings), expected)
