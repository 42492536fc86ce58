import yaml

from speclm.cards import GENERATED_MARK, HeadsCard, markdown_table

NUMBERS = {
    "kind": "eagle3",
    "title": "Heads",
    "summary": "A decoder.",
    "facts": {"layers": 1},
    "software": "Nothing else.",
    "num_parameters": 1234567,
    "dtype": "bfloat16",
}


def front_matter(text):
    return yaml.safe_load(text.split("---\n", 2)[1])


def test_header_names_library_base_and_license():
    card = HeadsCard(**NUMBERS, base="org/base", license="apache-2.0")
    assert front_matter(card.render()) == {
        "library_name": "speclm",
        "base_model": "org/base",
        "license": "apache-2.0",
        "tags": ["speclm", "eagle3", "speculative-decoding", "text-generation"],
    }


def test_what_is_not_known_is_left_out():
    card = HeadsCard(**NUMBERS).render()
    assert front_matter(card).keys() == {"library_name", "tags"}
    assert "| base model | not recorded |" in card
    assert "None" not in card
    assert "Measured" not in card
    assert 'SpecModel.from_pretrained("path/to/base", "path/to/this/folder")' in card


def test_text_gives_facts_loading_and_promises():
    card = HeadsCard(**NUMBERS, base="org/base", repo_id="me/heads", num_nodes=8).render()
    for part in ("# Heads for org/base", "| layers | 1 |", "| parameters | 1,234,567 |"):
        assert part in card
    for part in (
        "| tree | 8 nodes, not counting the root |\n\n## Load",
        "`typical` is **lossy**",
        "`exact`",
        "Nothing else",
    ):
        assert part in card
    assert 'SpecModel.from_pretrained("org/base", "me/heads")' in card
    assert GENERATED_MARK in card


def test_recipe_and_charts_come_after_the_figures():
    card = HeadsCard(
        **NUMBERS,
        figures={"tau": "2.9"},
        charts={"Speed-up": "report/speed.png"},
        recipe={"steps": 13},
        curves="curves.png",
    ).render()
    assert "| tau | 2.9 |\n\n![Speed-up](report/speed.png)\n\n## Training\n\n| | |\n" in card
    assert "| steps | 13 |\n\n![Curves of the training](curves.png)\n\n## Load" in card


def test_cells_of_a_table_are_one_line_each():
    table = markdown_table(("a", ""), [("x | y", "two\nlines"), (1, "")])
    assert table == "| a | |\n| --- | --- |\n| x \\| y | two lines |\n| 1 | |"


def test_figures_are_listed_if_there_are_any():
    card = HeadsCard(**NUMBERS, figures={"tau, greedy": "2.9"}).render()
    assert "## Measured\n\n| | |\n| --- | --- |\n| tau, greedy | 2.9 |\n\n## Load" in card
