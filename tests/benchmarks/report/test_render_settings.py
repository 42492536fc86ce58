from pathlib import Path

from benchmarks.report import render_settings as render
from speclm.generation.settings import SETTINGS, Fate

ROOT = Path(__file__).parents[3]


def test_tables_of_the_guide_are_those_of_the_code(capsys):
    assert render.main(["--check"]) == 0, capsys.readouterr().err


def test_tables_hold_every_setting_once():
    tables = "".join(render.render(fate.value, {}) for fate in Fate)
    for setting in SETTINGS:
        assert tables.count(f"| `{setting.name}` |") == 1


def test_row_says_what_a_setting_needs():
    (row,) = (line for line in render.render("delegated", {}).splitlines() if "_groups" in line)
    assert row == (
        "| `num_beam_groups` | field | Shapes beam search. Has no effect without `num_beams`. |"
    )


def test_unknown_fate_is_refused_with_exit_code_2(tmp_path, capsys):
    page = tmp_path / "docs" / "generate.md"
    page.parent.mkdir()
    page.write_text("<!-- settings:forgotten -->\n<!-- /settings -->\n")
    assert render.main(["--root", str(tmp_path)]) == 2
    assert "'forgotten'" in capsys.readouterr().err
