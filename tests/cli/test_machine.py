import json

import pytest
import torch

from speclm import __version__
from speclm.cli import machine as command
from speclm.errors import OptionError
from speclm.kernels.launch_table import built_in_rows, write_table


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the command see a GPU, on which every call takes equally long."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(command, "architecture", lambda _: "sm_90")
    monkeypatch.setattr(command, "measure_on", lambda _: lambda workload, config: 1.0)
    monkeypatch.setenv("SPECLM_KERNELS", "triton")


def test_sizes_of_any_gpu_are_shown(run):
    result = run("kernels", "--arch", "sm_80")
    assert result.exit_code == 0
    assert "here: " in result.output
    assert "sm_80, built in" in result.output
    assert result.output.count("two bytes") == sum(
        not row.is_float32 for row in built_in_rows("sm_80")
    )


def test_machine_without_a_gpu_is_told_how_to_see_sizes(run, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "--arch sm_90 shows the sizes" in run("kernels").output


@pytest.mark.usefixtures("gpu")
def test_sizes_of_this_gpu_and_those_of_a_file_are_shown(run, monkeypatch, tmp_path):
    path = tmp_path / "sizes.json"
    write_table(path, {"sm_90": built_in_rows("sm_90")[:1]})
    monkeypatch.setenv("SPECLM_KERNEL_CONFIGS", str(path))
    output = run("kernels").output.replace("\n", "")
    assert "sm_90, built in" in output
    assert "sizes.json" in output


@pytest.mark.usefixtures("gpu")
def test_tuned_sizes_are_written_and_shown(run, tmp_path):
    path = tmp_path / "sizes.json"
    result = run("kernels", "--tune", str(path))
    assert result.exit_code == 0, result.output
    assert "export SPECLM_KERNEL_CONFIGS=" in result.output
    assert len(json.loads(path.read_text())["sm_90"]) == len(built_in_rows("sm_90"))


def test_tuning_without_a_gpu_is_refused(run, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(OptionError, match="--tune measures on a GPU"):
        run("kernels", "--tune", str(tmp_path / "sizes.json"))


@pytest.mark.parametrize("arch", ["sm_99", "", "hopper"])
def test_architectures_without_sizes_are_refused_with_those_that_have_some(run, arch):
    with pytest.raises(OptionError, match=rf"--arch is '{arch}', expected one of .*'sm_90'"):
        run("kernels", "--arch", arch)


@pytest.mark.usefixtures("gpu")
def test_file_that_cannot_be_written_is_named_before_anything_is_measured(
    run, tmp_path, monkeypatch
):
    monkeypatch.setattr(command, "tune", None)
    with pytest.raises(OptionError, match=r"--tune is .* expected a file"):
        run("kernels", "--tune", str(tmp_path))


def test_env_prints_versions_machine_and_devices(run):
    result = run("env")
    assert result.exit_code == 0
    lines = dict(line.split(maxsplit=1) for line in result.output.splitlines())
    assert lines["speclm"] == __version__
    assert lines["torch"] == torch.__version__
    assert {"python", "transformers", "commit", "platform", "cpu", "cuda", "gpus"} <= set(lines)
    assert "ngram" in lines["methods"]
    assert lines["kernels"].startswith(("sdpa: ", "triton: "))
