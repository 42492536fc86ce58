import yaml

from speclm.cards import GENERATED_MARK
from speclm.methods.eagle.card import EagleCard

NUMBERS = {
    "num_layers": 1,
    "feature_layers": (2, 16, 29),
    "vocab_size": 128256,
    "num_parameters": 1234567,
    "dtype": "bfloat16",
    "has_own_lm_head": True,
}
OF_3 = {**NUMBERS, "kind": "eagle3", "draft_vocab_size": 32000}
OF_1 = {**NUMBERS, "kind": "eagle", "feature_layers": (), "draft_vocab_size": 128256}


def test_header_names_library_base_and_license():
    card = EagleCard(**OF_3, base="org/base", license="apache-2.0").render()
    assert yaml.safe_load(card.split("---\n", 2)[1]) == {
        "library_name": "speclm",
        "base_model": "org/base",
        "license": "apache-2.0",
        "tags": ["speclm", "eagle3", "speculative-decoding", "text-generation"],
    }


def test_what_is_not_known_is_left_out():
    card = EagleCard(**OF_1).render()
    assert yaml.safe_load(card.split("---\n", 2)[1]).keys() == {"library_name", "tags"}
    assert "base model | not recorded" in card
    assert "None" not in card
    assert "Measured" not in card
    assert "| tokens guessed | all |" in card
    assert "reads too, but for a bias" in card


def test_text_gives_numbers_loading_and_promises():
    card = EagleCard(**OF_3, base="org/base", repo_id="me/heads").render()
    assert "# EAGLE-3 heads for org/base" in card
    assert 'SpecModel.from_pretrained("org/base", "me/heads")' in card
    assert "| hidden states read | 2, 16, 29 (0 is the embeddings) |" in card
    assert "| tokens guessed | 32,000 of 128,256 |" in card
    assert "1,234,567" in card
    assert "`typical` is **lossy**" in card
    assert "SGLang" in card
    assert GENERATED_MARK in card


def test_figures_are_listed_if_there_are_any():
    card = EagleCard(**OF_3, figures={"tau, greedy": "2.9"}).render()
    assert "## Measured\n\n| | |\n| --- | --- |\n| tau, greedy | 2.9 |\n\n## Load" in card
