import json
import os
import shutil
import stat
from pathlib import Path

import jaxtyping
import pytest

from speclm.demo import assets
from speclm.errors import (
    CheckpointError,
    OptionError,
    SaveError,
    UnknownNameError,
    VocabularyMismatchError,
)
from speclm.serving import export_server
from tests.byte_tokenizer import VOCAB_SIZE
from tests.models import build_model
from tests.multimodal import shared_wrapper


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_folder_holds_base_heads_and_code_with_ordinary_permissions(base, draft, tmp_path):
    done = export_server(base, tmp_path / "served", heads=draft, check=False)
    assert done.method == "draft_model"
    folder = done.folder
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    copied = {path.name for path in base.iterdir()}
    written = {"README.md", "speclm_export.json", "custom_generate/generate.py"}
    assert written | copied | {f"heads/{path.name}" for path in draft.iterdir()} <= names
    umask = os.umask(0)
    os.umask(umask)
    modes = {stat.S_IMODE((folder / name).stat().st_mode) for name in written}
    assert modes == {0o666 & ~umask}
    # Weights take no room, and an edited config is not the base's.
    assert (folder / "model.safetensors").samefile(base / "model.safetensors")
    assert not (folder / "config.json").samefile(base / "config.json")
    assert done.num_bytes == sum((folder / name).stat().st_size for name in names)
    assert str(folder) in done.command


def test_export_replaces_an_earlier_one_whole(base, draft, tmp_path):
    out = tmp_path / "served"
    export_server(base, out, heads=draft, check=False)
    export_server(base, out, heads="ngram", check=False)
    assert not (out / "heads").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["served"]


def test_heads_that_do_not_fit_leave_the_earlier_export(base, tmp_path):
    out = tmp_path / "served"
    export_server(base, out, heads="ngram", check=False)
    before = contents(out)
    with pytest.raises(VocabularyMismatchError):
        export_server(base, out, heads=assets()["medusa"])
    assert contents(out) == before
    assert [path.name for path in tmp_path.iterdir()] == ["served"]


def test_folder_of_something_else_is_not_replaced(base, tmp_path, monkeypatch):
    shutil.copytree(base, tmp_path / "mine")
    with pytest.raises(CheckpointError, match="choose another"):
        export_server(base, tmp_path / "mine")
    out = export_server(base, tmp_path / "served", heads="ngram", check=False).folder
    (out / ".git").mkdir()
    with pytest.raises(CheckpointError, match="found a Git repository"):
        export_server(base, out, heads="ngram")
    (out / ".git").rmdir()
    (out / "speclm_export.json").write_text("damaged")
    with pytest.raises(CheckpointError, match="choose another"):
        export_server(base, out, heads="ngram")
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(CheckpointError, match="found a file"):
        export_server(base, file)
    for out in (file / "inside", tmp_path / ("x" * 300)):
        with pytest.raises(SaveError, match="choose another folder"):
            export_server(base, out, heads="ngram", check=False)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(CheckpointError, match="found the current folder"):
        export_server(base, ".", heads="ngram", check=False)
    with pytest.raises(CheckpointError, match="found no path"):
        export_server(base, "a\0b")


def test_base_that_the_server_cannot_load_is_refused(base, tmp_path):
    copied = Path(shutil.copytree(base, tmp_path / "copied"))
    config = json.loads((copied / "config.json").read_text())
    for names in ([], 5, "LlamaForCausalLM", ["NobodyForCausalLM"], ["pipeline"]):
        (copied / "config.json").write_text(json.dumps({**config, "architectures": names}))
        with pytest.raises(CheckpointError, match="expected one of Transformers"):
            export_server(copied, tmp_path / "out")
    with pytest.raises(UnknownNameError, match="no folder"):
        export_server("no such base", tmp_path / "out")
    with pytest.raises(OptionError, match="revision is 'v2'"):
        export_server(base, tmp_path / "out", revision="v2")
    (copied / "config.json").write_text(json.dumps(config))
    (copied / "speclm_export.json").write_text("{}")
    with pytest.raises(OptionError, match="is an exported folder"):
        export_server(copied, tmp_path / "out")


def test_heads_that_files_cannot_hold_are_refused(base, tmp_path, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as users run it
    for heads in (build_model("llama", vocab_size=VOCAB_SIZE), ["ngram", "lookup"], None):
        with pytest.raises(OptionError, match="save the heads first"):
            export_server(base, tmp_path / "out", heads=heads)
    with pytest.raises(OptionError, match="expected what JSON holds"):
        export_server(base, tmp_path / "out", heads_kwargs={"history": object()})
    assert list(tmp_path.iterdir()) == []


def test_base_that_reads_images_is_exported(tmp_path):
    folder = tmp_path / "base"
    shared_wrapper("llava").save_pretrained(folder)
    done = export_server(folder, tmp_path / "served", heads="ngram")
    assert done.verification == "tree attention"
    assert any("without drafts, silently" in note for note in done.notes)
    (folder / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(CheckpointError):
        export_server(folder, tmp_path / "served", heads="ngram")


def test_notes_say_what_the_server_ignores(base, tmp_path, monkeypatch):
    monkeypatch.setattr("speclm.serving.folder.is_serve_available", lambda: False)
    done = export_server(base, tmp_path / "served@v2", heads="ngram", check=False)
    assert any("ignores temperature" in note for note in done.notes)
    assert any("reads what follows @ as a revision" in note for note in done.notes)
    assert not any("no tokenizer" in note for note in done.notes)
    assert any('pip install "speclm[serving]"' in note for note in done.notes)
    copied = Path(shutil.copytree(base, tmp_path / "copied"))
    for path in (*copied.glob("tokenizer*"), copied / "chat_template.jinja"):
        path.unlink()
    (copied / "generation_config.json").write_text('{"do_sample": true}')
    (copied / "processor_config.json").write_text("{}")
    (copied / "README.md").write_text("---\nlicense: mit\n---\n")
    done = export_server(copied, tmp_path / "other", heads="ngram", check=False)
    assert not any("ignores temperature" in note for note in done.notes)
    assert any("no tokenizer" in note for note in done.notes)
    assert any("only /v1/completions" in note for note in done.notes)
    assert any("without drafts, silently" in note for note in done.notes)
    assert 'license: "mit"' in (done.folder / "README.md").read_text()
    (copied / "README.md").write_text("---\nlicense: [\n---\n")
    export_server(copied, tmp_path / "other", heads="ngram", check=False)
