import torch

from speclm import __version__
from speclm.bench import machine


def test_machine_names_processor_cores_and_threads():
    found = machine.describe_machine()
    assert found.cpu
    assert found.num_cores >= 1
    assert found.num_threads == torch.get_num_threads()
    assert len(found.gpus) == torch.cuda.device_count()


def test_versions_are_those_in_use():
    versions = machine.describe_versions()
    assert versions["torch"] == torch.__version__
    assert versions["speclm"] == __version__
    assert set(versions) - {"triton"} == {"python", "torch", "transformers", "speclm"}


def test_package_without_metadata_has_no_version():
    assert machine._version_of("no-such-package-here") == "unknown"


def test_outside_a_checkout_there_is_no_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "_ROOT", tmp_path)
    assert machine.describe_commit() == machine.Commit(sha=None, is_dirty=False)
    (tmp_path / ".git").mkdir()  # git finds no repository in it
    assert machine.describe_commit().sha is None


def test_processor_falls_back_on_the_platform(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "_CPU_INFO", tmp_path / "none")
    assert machine._cpu_model()


def test_triton_is_named_where_it_is_installed(monkeypatch):
    for found, expected in (("3.9.9", "3.9.9"), ("unknown", None)):
        monkeypatch.setattr(machine, "_version_of", lambda name, found=found: found)
        assert machine.describe_versions().get("triton") == expected
