import pytest
import torch
from transformers import GPT2Config, LlamaConfig, Qwen3Config

from speclm.errors import OptionError
from speclm.methods.block.config import KINDS, BlockConfig, usual_layers
from speclm.methods.block.network import BlockHeads
from tests.methods.block.block_heads import NUMBERS


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_size": 0}, r"hidden_size is 0, expected at least 1"),
        ({"num_layers": 65}, r"num_layers is 65, expected 1 to 64"),
        ({"block_size": 1}, r"block_size is 1, expected 2 to 64"),
        ({"block_size": 65}, r"block_size is 65, expected 2 to 64"),
        ({"rms_norm_eps": 0.0}, r"rms_norm_eps is 0.0, expected a finite number above 0"),
        ({"hidden_act": "no"}, r"hidden_act is 'no', expected an activation"),
        ({"num_kv_heads": 3}, r"num_heads is 4, expected a multiple of num_kv_heads, 3"),
        ({"head_dim": 3}, r"head_dim is 3, expected an even number"),
        ({"rope_parameters": {}}, r"rope_type is None, expected one of"),
        ({"feature_layers": ()}, r"feature_layers is \(\), expected at least one"),
        ({"feature_layers": (2, 2)}, r"\(2, 2\), expected at least one and each once"),
        ({"feature_layers": (-1, 2)}, r"feature_layers is -1"),
        ({"windows": (None,)}, r"windows is \(None,\), expected 2, one for each layer"),
        ({"windows": (None, 0)}, r"windows is 0, expected at least 1"),
        ({"is_causal": (True,)}, r"is_causal is \(True,\), expected 2, one for each layer"),
        ({"draft_vocab_size": 21}, r"draft_vocab_size is 21, expected at most 20"),
        ({"draft_vocab_size": 5}, r"has_own_lm_head is off, expected on.*switch it on"),
        ({"mask_token_id": 20}, r"mask_token_id is 20, expected 0 to 19"),
        ({"markov_rank": 4}, r"markov_rank is 4 without a Markov head, expected 0"),
        ({"markov": "other", "markov_rank": 4}, r"markov is 'other', expected one of"),
        ({"markov": "gated"}, r"markov_rank is 0, expected at least 1"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(change, words):
    with pytest.raises(OptionError, match=words):
        BlockConfig(**{**NUMBERS, **change})


def test_anchor_drafts_a_token_only_if_positions_draft_the_next_one():
    assert BlockConfig(**NUMBERS).num_drafts == 4
    assert BlockConfig(**{**NUMBERS, "predicts_next": False}).num_drafts == 3


def test_output_of_the_last_layer_is_read_after_the_norm():
    config = BlockConfig(**NUMBERS)
    assert config.layers_to_read(8) == (2, 4)
    assert config.layers_to_read(4) == (2, -1)
    with pytest.raises(OptionError, match=r"\(2, 4\), expected at most 3, the layers of the base"):
        config.layers_to_read(3)


@pytest.mark.parametrize(
    ("num_layers", "expected"),
    [(36, (2, 10, 18, 26, 34)), (8, (2, 3, 4, 5, 6)), (6, (2, 3, 4)), (5, (2, 3)), (4, (2,))],
)
def test_usual_layers_are_spread_evenly(num_layers, expected):
    assert usual_layers(num_layers) == expected  # the first as released for Qwen3-8B


def test_base_with_too_few_layers_needs_named_ones():
    base = LlamaConfig(hidden_size=16, num_attention_heads=4, num_hidden_layers=3, vocab_size=50)
    with pytest.raises(OptionError, match=r"the base has 3 layers, expected at least 4.*name"):
        BlockConfig.from_model_config(base, kind="dflash")
    config = BlockConfig.from_model_config(base, kind="dflash", feature_layers=(1, 3))
    assert config.layers_to_read(3) == (1, -1)
    with pytest.raises(OptionError, match=r"\(1, 4\), expected at most 3"):
        BlockConfig.from_model_config(base, kind="dflash", feature_layers=(1, 4))


BASES = {
    "llama": LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=8,
        vocab_size=50,
        rms_norm_eps=1e-5,
        pad_token_id=0,
        eos_token_id=[1, 2],
        rope_parameters={"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0},
    ),
    "gpt2": GPT2Config(n_embd=12, n_head=2, n_layer=8, vocab_size=50),
    "qwen3": Qwen3Config(vocab_size=50, num_hidden_layers=8, eos_token_id=3, pad_token_id=3),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", BASES)
def test_untrained_heads_can_be_made_for_any_family(family, kind):
    base = BASES[family]
    config = BlockConfig.from_model_config(base, kind=kind, num_layers=3, block_size=5)
    assert (config.hidden_size, config.vocab_size) == (base.hidden_size, 50)
    assert (config.num_layers, len(config.windows), len(config.is_causal)) == (3, 3, 3)
    assert config.num_drafts == (5 if kind == "dspark" else 4)
    assert (config.markov, config.has_confidence) == (
        ("vanilla", True) if kind == "dspark" else (None, False)
    )
    assert all(config.is_causal) == (kind != "dflash")
    assert BlockHeads(config, device=torch.device("meta")).fc.in_features == 5 * base.hidden_size


def test_numbers_of_a_base_are_taken_over_but_not_the_scaling_of_its_rotation():
    config = BlockConfig.from_model_config(BASES["llama"], kind="dspark", draft_vocab_size=10)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (4, 2, 4)
    assert (config.intermediate_size, config.rms_norm_eps) == (24, 1e-5)
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 5e5}
    assert (config.draft_vocab_size, config.has_own_lm_head) == (10, True)


def test_mask_is_the_padding_token_or_else_the_last_of_the_vocabulary():
    masks = {
        family: BlockConfig.from_model_config(base, kind="dflash").mask_token_id
        for family, base in BASES.items()
    }
    assert masks == {"llama": 0, "gpt2": 49, "qwen3": 49}  # qwen3 pads with the end of a text


def test_unknown_kind_is_refused():
    with pytest.raises(OptionError, match=r"kind is 'eagle', expected one of \('dspark'"):
        BlockConfig.from_model_config(BASES["llama"], kind="eagle")
    with pytest.raises(OptionError, match=r"num_layers is 0, expected 1 to 64"):
        BlockConfig.from_model_config(BASES["llama"], kind="dflash", num_layers=0)
