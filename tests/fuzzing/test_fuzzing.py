"""Files from strangers load, or end in an error of speclm's own, in bounded time and memory."""

import json
import os
import pickle
import signal
from pathlib import Path

import pytest

from speclm.errors import CheckpointError
from speclm.files.weights import MAX_HEADER, read_json, read_text, weights_digest, weights_of
from tests import eagle_tables
from tests.forks import in_child
from tests.fuzzing import cases, layouts
from tests.fuzzing.cases import Case, log_of, make_case, run_case, run_cases
from tests.fuzzing.exported import ALL, files_of
from tests.fuzzing.mutations import CANARY, PICKLES, Folder
from tests.fuzzing.verbs import VERBS, load_folder, publish_folder, read_folder

pytestmark = [pytest.mark.untraced, pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize("layout", ALL)
def test_whole_folders_of_every_layout_load_or_are_named(tmp_path, layout):
    Folder(dict(files_of(layout))).write(tmp_path / "heads")
    usual = read_folder if layout == "medusa, merged" else load_folder
    (use,) = VERBS.get(layout, (usual,))
    if layout in layouts.REFUSED:
        with pytest.raises(CheckpointError, match=layout):
            use(tmp_path / "heads")
    else:
        use(tmp_path / "heads")


def test_100_damaged_folders_load_or_are_refused(tmp_path):
    counts, faults = run_cases(range(100), tmp_path / "case")
    assert not faults
    assert counts["loaded"] > 0
    assert counts["refused"] > counts["loaded"]


@pytest.mark.slow
def test_2000_damaged_folders_load_or_are_refused(tmp_path):
    _, faults = run_cases(range(100, 2100), tmp_path / "case")
    assert not faults


def test_a_case_is_made_again_from_its_number():
    assert make_case(7) == make_case(7)
    assert make_case(7) != make_case(8)


def test_code_that_is_run_is_found(tmp_path, monkeypatch):
    def unsafe(place: Path) -> None:
        pickle.loads(next(place.glob("*.bin")).read_bytes())

    monkeypatch.setenv(CANARY, "")
    case = Case(0, "code", (), Folder({"pytorch_model.bin": PICKLES["code"]}), unsafe)
    assert run_case(case, tmp_path / "case") == "execution"


def test_a_case_that_hangs_is_named(tmp_path, monkeypatch):
    def stuck(place: Path) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
        while True:
            pass

    monkeypatch.setattr(cases, "HANG", 0.1)
    case = Case(7, "eagle3", ("header",), Folder({}), stuck)
    with pytest.raises(EOFError):  # the process ends without an answer
        in_child(lambda: run_case(case, tmp_path / "case"))
    log = log_of(tmp_path / "case").read_text()
    assert log.startswith("case 7: stuck of eagle3 ('header',)")
    assert "in stuck" in log


@pytest.mark.parametrize("layout", ["eagle3", "z-lab", "medusa"])
@pytest.mark.parametrize("name", ["hidden_act", "base_model_name_or_path"])
def test_messages_about_long_names_are_short(tmp_path, layout, name):
    files = dict(files_of(layout))
    files["config.json"] = json.dumps({**json.loads(files["config.json"]), name: "y" * 9999})
    files["config.json"] = files["config.json"].encode()
    case = Case(0, layout, (), Folder(files), publish_folder)
    assert run_case(case, tmp_path / "case") in ("loaded", "refused")


def test_names_in_an_index_are_those_of_files(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"fc.weight": "a" * 256}}))
    with pytest.raises(CheckpointError, match=r"weight_map is .*, expected file names"):
        read_folder(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_keys_that_are_too_long_for_messages_are_refused(tmp_path, name):
    folder = Folder(layouts.folder(eagle_tables, {"y" * 501: (1, 1)}, {}, name=name))
    folder.write(tmp_path / "heads")
    with pytest.raises(CheckpointError, match=r"a key has 501 characters, expected at most 500"):
        read_folder(tmp_path / "heads")


def test_what_cannot_be_read_next_to_weights_is_named(tmp_path):
    card = tmp_path / "README.md"
    card.symlink_to("/proc/self/mem")  # a regular file, as far as the system says
    with pytest.raises(CheckpointError, match=r"README.md: the file cannot be read \(OSError"):
        read_text(card)
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(CheckpointError, match=r"model.safetensors: the file cannot be read"):
        weights_digest(tmp_path)


def test_headers_are_not_read_past_a_limit(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes((MAX_HEADER + 1).to_bytes(8, "little"))
    os.truncate(file, 2 * MAX_HEADER)
    with pytest.raises(CheckpointError, match="header has 4194305 bytes, expected at most"):
        weights_of(file)


@pytest.mark.parametrize("kind", ["pipe", "folder", "device"])
def test_only_regular_files_are_read(tmp_path, kind):
    makers = {
        "pipe": os.mkfifo,
        "folder": os.mkdir,
        "device": lambda path: path.symlink_to("/dev/zero"),
    }
    for name, read in {
        "config.json": read_json,
        "a.safetensors": weights_of,
        "a.pt": weights_of,
    }.items():
        makers[kind](tmp_path / name)
        with pytest.raises(CheckpointError, match="regular file"):
            read(tmp_path / name)


@pytest.mark.parametrize("text", ["[" + "0," * 1_000_000 + "0]", " " * (21 * 2**20)])
def test_large_json_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"bytes or more and .* values, expected up to"):
        read_json(tmp_path / "config.json")
