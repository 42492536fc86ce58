import pytest

from speclm.errors import OptionError, UnknownNameError


def test_bundled_base_is_exported_with_the_command_that_serves_it(run, tmp_path):
    out = tmp_path / "served"
    result = run("export-server", "--heads", "eagle3", "--tree", "auto", "--out", str(out))
    assert result.exit_code == 0
    assert "drafts by eagle" in result.output
    assert "verification: tree attention" in result.output
    assert f"transformers serve --trust-remote-code {out}" in result.output
    assert "note: The base's generation config does not sample" in result.output


def test_unknown_base_and_options_are_refused_before_anything_is_written(run, tmp_path):
    out = tmp_path / "served"
    with pytest.raises(UnknownNameError, match="no folder and no hub id"):
        run("export-server", "no such base", "--out", str(out))
    with pytest.raises(OptionError, match="engine is"):
        run("export-server", "--engine", "fast", "--out", str(out))
    assert not out.exists()
