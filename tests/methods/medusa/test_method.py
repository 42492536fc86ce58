import yaml

from speclm.cards import GENERATED_MARK
from speclm.methods.medusa.card import MedusaCard

NUMBERS = {
    "num_heads": 3,
    "num_layers": 2,
    "num_parameters": 1234567,
    "dtype": "bfloat16",
    "num_nodes": 8,
}


def front_matter(card: str) -> dict:
    _, front, _ = card.split("---\n", 2)
    return yaml.safe_load(front)


def test_header_names_library_base_and_license():
    card = MedusaCard(**NUMBERS, has_own_lm_head=True, base="org/base", license="apache-2.0")
    assert front_matter(card.render()) == {
        "library_name": "speclm",
        "base_model": "org/base",
        "license": "apache-2.0",
        "tags": ["speclm", "medusa", "speculative-decoding", "text-generation"],
    }


def test_what_is_not_known_is_left_out():
    card = MedusaCard(**NUMBERS, has_own_lm_head=False).render()
    assert front_matter(card).keys() == {"library_name", "tags"}
    assert "base model | not recorded" in card
    assert "None" not in card


def test_text_gives_numbers_loading_and_promises():
    card = MedusaCard(**NUMBERS, has_own_lm_head=True, base="org/base", repo_id="me/heads").render()
    assert 'SpecModel.from_pretrained("org/base", "me/heads")' in card
    assert "| heads | 3 |" in card
    assert "1,234,567" in card
    assert "`typical` is **lossy**" in card
    assert "`exact`" in card
    assert GENERATED_MARK in card
