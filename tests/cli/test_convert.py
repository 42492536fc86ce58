import pytest

from speclm.demo.bundle import assets
from speclm.errors import OptionError


def test_convert_prints_what_loads_the_files(run, tmp_path):
    out, source = str(tmp_path / "out"), str(assets()["eagle3"])
    result = run("convert", source, "--to", "sglang", "--out", out)
    assert result.exit_code == 0
    assert "eagle heads, speclm -> sglang" in result.output
    assert "--speculative-algorithm EAGLE3" in result.output
    assert out in result.output
    with pytest.raises(OptionError, match="files of Medusa heads: unknown option 'token_map'"):
        run("verify", str(assets()["medusa"]), "--token-map", "freq_5.pt")
    again = run("verify", out, "--source", source)
    assert again.exit_code == 0
    assert "logits equal to those of" in again.output
    assert "loaded by" in again.output
