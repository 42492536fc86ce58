from pathlib import Path

from benchmarks.report import render_launches as render
from speclm.kernels.launch_table import TABLE

ROOT = Path(__file__).parents[3]


def test_table_of_the_guide_is_that_of_the_code(capsys):
    assert render.main(["--check"]) == 0, capsys.readouterr().err


def test_every_gpu_of_the_table_is_in_the_guide():
    page = (ROOT / "docs" / "kernels.md").read_text()
    assert all(f"{name} (" in page for name in TABLE if name.startswith(("sm_", "gfx")))


def test_gpus_with_equal_sizes_share_their_lines():
    assert render.render("sm_90", {}).count("\n") == len(TABLE["sm_90"]) + 2
    assert render.render("sm_86,sm_89", {}).count("\n") == len(TABLE["sm_86"]) + 2


def test_unknown_gpu_is_refused_with_exit_code_2(tmp_path, capsys):
    page = tmp_path / "docs" / "kernels.md"
    page.parent.mkdir()
    page.write_text("<!-- launches:sm_1 -->\n<!-- /launches -->\n")
    assert render.main(["--root", str(tmp_path)]) == 2
    assert "sm_1 is not in the table" in capsys.readouterr().err
