"""What EAGLE heads say about themselves, and the options of their training."""

import pytest
import torch
import yaml

from speclm.errors import OptionError
from speclm.methods.eagle.checkpoint import EagleCheckpoint
from speclm.methods.eagle.config import EagleConfig
from speclm.methods.eagle.method import (
    Eagle3TrainingOptions,
    EagleMethod,
    EagleTrainingOptions,
    eagle_card,
)

SIZES = {
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 2,
    "vocab_size": 128256,
    "target_hidden_size": 8,
}
OF_3 = {"kind": "eagle3", "draft_vocab_size": 32000, "num_features": 3, "has_own_lm_head": True}
OF_1 = {"kind": "eagle", "draft_vocab_size": 128256}


def card(numbers, **changes):
    tensors = {"fc.weight": torch.zeros(1111, 1111), "draft_columns": torch.zeros(9).long()}
    checkpoint = EagleCheckpoint(EagleConfig(**SIZES, **numbers), tensors, **changes)
    return eagle_card(checkpoint, num_target_layers=32, repo_id="me/heads").render()


def test_card_of_eagle_3_gives_numbers_and_loading():
    text = card(OF_3, base_name_or_path="org/base")
    assert yaml.safe_load(text.split("---\n", 2)[1])["tags"][1] == "eagle3"
    assert "# EAGLE-3 heads for org/base" in text
    assert 'SpecModel.from_pretrained("org/base", "me/heads")' in text
    assert "| hidden states read | 2, 16, 29 (0 is the embeddings) |" in text
    assert "| tokens drafted | 32,000 of 128,256 |" in text
    assert "1,234,321" in text
    assert "SGLang" in text


def test_card_of_eagle_1_leaves_out_what_is_not_known():
    text = card(OF_1)
    assert "base model | not recorded" in text
    assert "None" not in text
    assert "| tokens drafted | all |" in text
    assert "ignores a bias after the joined inputs" in text


def test_training_options_that_contradict_are_refused():
    for options, wrong, words in (
        (EagleTrainingOptions, {"num_layers": 0}, "--num-layers is 0"),
        (EagleTrainingOptions, {"init_revision": "v2"}, "--init-revision is 'v2' without --init"),
        (EagleTrainingOptions, {"init": "a", "num_layers": 2}, "--num-layers is 2 next to --init"),
        (Eagle3TrainingOptions, {"draft_vocab_size": 0}, "--draft-vocab-size is 0"),
        (Eagle3TrainingOptions, {"init": "a", "draft_vocab_size": 9}, "next to --init 'a'"),
    ):
        with pytest.raises(OptionError, match=words):
            options(**wrong)


def test_configs_may_name_eagle_in_any_case_and_may_be_broken(tmp_path):
    method, config = EagleMethod(), tmp_path / "config.json"
    assert not method.is_declared(tmp_path)
    for text, is_declared in (
        ('{"architectures": ["LlamaForCausalLMEagle3"]}', True),
        ('{"architectures": ["LlamaForCausalLM"]}', False),
        ('{"architectures": [3]}', False),
        ("[" * 10**5, False),
        ("[]", False),
    ):
        config.write_text(text)
        assert method.is_declared(tmp_path) is is_declared
