import pytest
import torch
from transformers import (
    DeepseekV3Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    Qwen3VLConfig,
)

from speclm.errors import OptionError
from speclm.methods.eagle.config import EagleConfig
from speclm.methods.eagle.network import EagleHeads

NUMBERS = {
    "kind": "eagle",
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 2,
    "vocab_size": 20,
    "draft_vocab_size": 20,
    "target_hidden_size": 8,
}
EAGLE3 = {"kind": "eagle3", "num_features": 3, "has_own_lm_head": True}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kind": "eagle2"}, r"kind is 'eagle2', expected one of \('eagle', 'eagle3'\)"),
        ({"hidden_size": 0}, r"hidden_size is 0, expected at least 1"),
        ({"rms_norm_eps": 0.0}, r"rms_norm_eps is 0.0, expected a finite number above 0"),
        ({"num_key_value_heads": 3}, r"num_attention_heads is 4, expected a multiple.*3"),
        ({"head_dim": 3}, r"head_dim is 3, expected an even number"),
        ({"sliding_window": 0}, r"sliding_window is 0"),
        ({"hidden_act": "no"}, r"hidden_act is 'no', expected an activation"),
        ({"rope_parameters": {"rope_theta": 1.0}}, r"rope_type is None, expected one of"),
        ({"rope_parameters": {"rope_type": "default"}}, r"rope_theta is None"),
        (
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1.0, "factor": 2.0}},
            r"type 'llama3' name no 'low_freq_factor'.*add it",
        ),
        ({"norm_output": True}, r"norm_output is set, expected that of eagle3 only"),
        ({"num_features": 2}, r"num_features above 1 or feature_layers is set"),
        ({"feature_layers": (1,)}, r"feature_layers is set, expected that of eagle3"),
        ({"target_hidden_size": 6}, r"target_hidden_size is 6, expected 8.*use eagle3"),
        ({"draft_vocab_size": 21}, r"draft_vocab_size is 21, expected at most 20"),
        ({**EAGLE3, "fc_norm": True, "norm_before_fc": True}, r"both set, expected one"),
        ({**EAGLE3, "num_features": 2}, r"usual feature_layers are 3; name the"),
        ({**EAGLE3, "feature_layers": (1, 2)}, r"\(1, 2\), expected 3 different"),
        ({**EAGLE3, "feature_layers": (-1, 2, 3)}, r"feature_layers is -1"),
        (
            {**EAGLE3, "draft_vocab_size": 5, "has_own_lm_head": False},
            r"has_own_lm_head is off, expected on.*switch it on",
        ),
        ({**EAGLE3, "target_hidden_size": 6}, r"has_own_embeddings is off.*do not fit"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(change, words):
    with pytest.raises(OptionError, match=words):
        EagleConfig(**{**NUMBERS, **change})


def test_layers_to_read_are_the_usual_ones_or_those_named():
    usual = EagleConfig(**{**NUMBERS, **EAGLE3})
    assert usual.layers_to_read(32) == (2, 16, 29)
    assert usual.layers_to_read(7) == (2, 3, 4)
    named = EagleConfig(**{**NUMBERS, **EAGLE3, "feature_layers": (1, 5, 6)})
    assert named.layers_to_read(7) == (1, 5, 6)
    with pytest.raises(OptionError, match=r"the base has 6 layers, expected at least 7.*name"):
        usual.layers_to_read(6)
    with pytest.raises(OptionError, match=r"\(1, 5, 6\), expected at most 5.*trained on"):
        named.layers_to_read(6)  # the last layer's output is not read


def test_layers_counted_without_the_embeddings_are_the_usual_ones():
    # Source: lmsys's heads for Qwen3-235B, which has 94 layers.
    config = EagleConfig(**{**NUMBERS, **EAGLE3, "feature_layers": (1, 46, 90)})
    assert config.layers_to_read(94) == (2, 47, 91)
    assert config.layers_to_read(95) == (1, 46, 90)


FAMILIES = {
    "llama": LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=8,
        vocab_size=50,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0},
    ),
    "gemma3": Gemma3TextConfig(
        hidden_size=12, head_dim=8, num_attention_heads=2, num_key_value_heads=1, vocab_size=50
    ),
    "gpt2": GPT2Config(n_embd=12, n_head=2, n_layer=8, vocab_size=50),
    "mamba": MambaConfig(hidden_size=16, num_hidden_layers=8, vocab_size=50),
    "deepseek": DeepseekV3Config(vocab_size=50, hidden_size=32, intermediate_size=24),
    "qwen3_vl": Qwen3VLConfig(),
}


@pytest.mark.parametrize("kind", ["eagle", "eagle3"])
@pytest.mark.parametrize("family", FAMILIES)
def test_untrained_heads_can_be_made_for_any_family(family, kind):
    base = FAMILIES[family]
    draft_vocab_size = 10 if kind == "eagle3" else None
    config = EagleConfig.from_model_config(base, kind=kind, draft_vocab_size=draft_vocab_size)
    text = base.get_text_config()
    assert (config.hidden_size, config.vocab_size) == (text.hidden_size, text.vocab_size)
    assert config.target_hidden_size == text.hidden_size
    assert config.draft_vocab_size == (draft_vocab_size or text.vocab_size)
    assert (config.num_features, config.has_own_lm_head) == (
        (3, True) if kind == "eagle3" else (1, False)
    )
    heads = EagleHeads(config, device=torch.device("meta"))
    assert heads.fc.weight.shape[0] == text.hidden_size


def test_numbers_of_a_base_are_taken_over_but_not_the_scaling_of_its_rotation():
    config = EagleConfig.from_model_config(FAMILIES["llama"], kind="eagle")
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (4, 2, 4)
    assert (config.intermediate_size, config.rms_norm_eps) == (24, 1e-5)
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 5e5}
    gemma = EagleConfig.from_model_config(FAMILIES["gemma3"], kind="eagle")
    assert (gemma.head_dim, gemma.rope_parameters["rope_theta"]) == (8, 1e6)
    assert EagleConfig.from_model_config(FAMILIES["gpt2"], kind="eagle").intermediate_size == 48


def test_base_with_too_few_layers_needs_named_ones():
    base = LlamaConfig(hidden_size=16, num_attention_heads=4, num_hidden_layers=4, vocab_size=50)
    with pytest.raises(OptionError, match=r"the base has 4 layers.*name others"):
        EagleConfig.from_model_config(base, kind="eagle3")
    config = EagleConfig.from_model_config(base, kind="eagle3", feature_layers=(1, 3))
    assert (config.num_features, config.feature_layers) == (2, (1, 3))
    with pytest.raises(OptionError, match=r"\(1, 4\), expected at most 3"):
        EagleConfig.from_model_config(base, kind="eagle3", feature_layers=(1, 4))
