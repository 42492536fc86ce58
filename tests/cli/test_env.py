import torch

from speclm import __version__


def test_env_prints_versions_machine_and_devices(run):
    result = run("env")
    assert result.exit_code == 0
    lines = dict(line.split(maxsplit=1) for line in result.output.splitlines())
    assert lines["speclm"] == __version__
    assert lines["torch"] == torch.__version__
    assert {"python", "transformers", "commit", "platform", "cpu", "cuda", "gpus"} <= set(lines)
    assert "ngram" in lines["proposers"]
    assert lines["kernels"].startswith(("sdpa: ", "triton: "))
