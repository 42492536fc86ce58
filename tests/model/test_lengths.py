"""Prompts of every awkward length: the tokens of regular generation, in fewer forwards."""

from functools import cache
from itertools import product

import pytest
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from speclm import SpecModel
from speclm.cache import TreeCache, tree_cache
from speclm.cache.tree_cache import BLOCK
from speclm.testing import ScriptedProposer
from tests.exactness import GREEDY, MODES, require_exact, tiny
from tests.grids import turns
from tests.models import generate, prompts

ORIGINAL = 32  # positions before the scaling
WINDOW = 8
POSITIONS = 24

SCALED_LENGTHS = (
    (10,),
    (ORIGINAL - 12,),
    (ORIGINAL - 2,),
    (ORIGINAL + 8,),
    (ORIGINAL - 2, 25, 3),
)
WINDOW_LENGTHS = (
    (1,),
    (2,),
    (WINDOW - 1,),
    (WINDOW,),
    (WINDOW + 1,),
    (1, 1, 1),
    (WINDOW + 1, WINDOW, 1),
)
BLOCK_LENGTHS = ((BLOCK - 1,), (BLOCK,), (BLOCK + 1,), (BLOCK, BLOCK - 1, 3))
ROTARY_LENGTHS = ((10,), (POSITIONS - 1,), (POSITIONS,), (POSITIONS, 5))

ROPES = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
}
WINDOWED = {
    "mistral": (MistralForCausalLM, MistralConfig, {}),
    "qwen2": (
        Qwen2ForCausalLM,
        Qwen2Config,
        {"use_sliding_window": True, "max_window_layers": 1},
    ),
    "gemma3": (
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        {"layer_types": ["sliding_attention", "full_attention"]},
    ),
}
BOUNDED = {
    "gpt2": (
        GPT2LMHeadModel,
        GPT2Config,
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": POSITIONS},
    ),
    "opt": (OPTForCausalLM, OPTConfig, {"ffn_dim": 40, "word_embed_proj_dim": 32}),
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
}


@cache
def scaled(rope):
    own = {} if rope == "linear" else {"original_max_position_embeddings": ORIGINAL}
    parameters = {**ROPES[rope], **own, "rope_theta": 10000.0}
    model = tiny(
        LlamaForCausalLM,
        LlamaConfig,
        max_position_embeddings=4 * ORIGINAL,
        rope_parameters=parameters,
    )
    return SpecModel(model, None)


@cache
def windowed(family):
    model_type, config_type, own = WINDOWED[family]
    model = tiny(model_type, config_type, sliding_window=WINDOW, max_position_embeddings=512, **own)
    return SpecModel(model, None)


@cache
def bounded(family):
    model_type, config_type, own = BOUNDED[family]
    shape = {} if family == "gpt2" else {"max_position_embeddings": POSITIONS}
    return SpecModel(tiny(model_type, config_type, **shape, **own), None)


@cache
def roomy():
    model = tiny(LlamaForCausalLM, LlamaConfig, num_hidden_layers=1, max_position_embeddings=8192)
    return SpecModel(model, None)


def tokens(*lengths):
    return prompts(*lengths, vocab_size=60)


def halved(models, lengths):
    """Return all cells, of which `make test` runs every second one, the modes in turns."""
    cells = []
    for (row, model), (column, length) in product(enumerate(models), enumerate(lengths)):
        for mode, name in enumerate(MODES):
            runs = (row + column) % 2 == 0 and mode == column // 2 % 2
            cells.append(pytest.param(model, length, name, marks=() if runs else pytest.mark.slow))
    return cells


@pytest.mark.parametrize(("rope", "lengths", "mode"), halved(ROPES, SCALED_LENGTHS))
def test_scaled_positions_below_at_and_beyond_the_original_length(rope, lengths, mode):
    require_exact(scaled(rope), tokens(*lengths), max_new_tokens=12, **MODES[mode])


@pytest.mark.parametrize(("family", "lengths", "mode"), halved(WINDOWED, WINDOW_LENGTHS))
def test_prompts_as_long_as_the_window_and_much_shorter(family, lengths, mode):
    require_exact(windowed(family), tokens(*lengths), max_new_tokens=11, **MODES[mode])


@pytest.mark.parametrize(("lengths", "mode"), turns([(4096,), (4096, 7)], MODES))
def test_prompt_of_thousands_of_tokens(lengths, mode):
    require_exact(roomy(), tokens(*lengths), max_new_tokens=8, **MODES[mode])


@pytest.mark.parametrize(("lengths", "mode"), turns(BLOCK_LENGTHS, MODES))
def test_drafts_that_cross_the_end_of_a_block_of_the_cache(lengths, mode):
    require_exact(roomy(), tokens(*lengths), max_new_tokens=10, **MODES[mode])


def test_trees_that_just_fill_the_cache(monkeypatch):
    monkeypatch.setattr(tree_cache, "BLOCK", 8)
    spec, num_free, append = roomy(), [], TreeCache.append

    def appended(self, num_slots):
        append(self, num_slots)
        num_free.append(self.capacity - self.tree_start - self.num_pending)

    monkeypatch.setattr(TreeCache, "append", appended)
    for length in range(20, 28):
        require_exact(spec, tokens(length), max_new_tokens=16, **GREEDY)
    assert min(num_free) == 0


@pytest.mark.parametrize(
    ("family", "num_prompt", "mode"),
    halved(BOUNDED, [10, POSITIONS - 4, POSITIONS - 1, POSITIONS]),
)
def test_text_that_ends_at_the_last_position(family, num_prompt, mode):
    # The last token that is emitted needs no position of its own.
    end = {"max_length": POSITIONS + 1, "is_faster": num_prompt < POSITIONS - 1, **MODES[mode]}
    require_exact(bounded(family), tokens(num_prompt), **end)
    require_exact(bounded(family), tokens(num_prompt, num_prompt - 3, 2), **end)


@pytest.mark.parametrize(("lengths", "mode"), turns(ROTARY_LENGTHS, MODES))
def test_rotary_text_that_goes_on_beyond_the_last_position(lengths, mode):
    require_exact(bounded("llama"), tokens(*lengths), max_new_tokens=24, **MODES[mode])


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_learned_text_that_goes_beyond_the_last_position_fails_as_regular_generation_does(family):
    spec, inputs = bounded(family), tokens(10)
    reference = generate(spec.base, inputs, max_new_tokens=POSITIONS - 10, **GREEDY)[0]
    spec.proposer = ScriptedProposer([reference[0, 10:].tolist() + [1] * 20])
    for model in (spec.base, spec):
        with pytest.raises(IndexError):
            model.generate(**inputs, max_new_tokens=24, **GREEDY)
