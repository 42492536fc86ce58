"""Files of memories: damaged, foreign and hostile ones end in one typed error."""

import json
import struct

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from speclm.errors import CheckpointError, OptionError
from speclm.methods.recycling.checkpoint import memory_fingerprint
from speclm.methods.recycling.memory import CandidateMemory
from tests.models import build_model, shared_model

VOCAB = 9
ABOUT = {"kind": "speclm candidate memory", "version": "1", "vocab_size": "9", "fingerprint": "f"}


@pytest.fixture
def path(tmp_path):
    memory = CandidateMemory(vocab_size=VOCAB, num_candidates=2)
    ids = np.array([[1, 2], [3, 4], [5, 6]])
    memory.store([-1, 1, 2], [1, 2, 3], ids, np.full((3, 2), -1.0))
    memory.save(tmp_path / "memory.safetensors", fingerprint="f")
    return tmp_path / "memory.safetensors"


def load(path, **changes):
    return CandidateMemory.load(path, **{"vocab_size": VOCAB, "fingerprint": "f", **changes})


def test_memories_of_other_models_are_refused(path):
    with pytest.raises(CheckpointError, match=r"vocabulary of '9' tokens, expected .*'10'; name"):
        load(path, vocab_size=10)
    with pytest.raises(
        CheckpointError, match=r"fingerprint 'f', expected 'g'; name .* speclm warm"
    ):
        load(path, fingerprint="g")


def changed(name, value):
    def change(tensors, about):
        tensors[name] = value(tensors[name])

    return change


def put(index, value):
    def change(array):
        array[index] = value
        return array

    return change


def without(tensors, about):
    del tensors["pairs"]


def extra(tensors, about):
    tensors["more"] = np.zeros(3)


def other_kind(tensors, about):
    about["kind"] = "heads"


def newer(tensors, about):
    about["version"] = "2"


def nothing_about(tensors, about):
    about.clear()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed("token_ids", put((0, 0), VOCAB)), "candidates that occur twice or are not of"),
        (changed("pair_ids", put((0, 0), -1)), "candidates that occur twice or are not of"),
        (changed("pair_ids", put((0, 0), 4)), "candidates that occur twice"),
        (changed("tokens", put(2, VOCAB)), "not ascending within the vocabulary"),
        (changed("tokens", put(1, 1)), "not ascending within the vocabulary"),
        (changed("pairs", put(0, -1)), "pairs that occur twice or are not of"),
        (changed("pairs", put(0, VOCAB**2)), "pairs that occur twice or are not of"),
        (changed("pairs", lambda pairs: pairs[:1].repeat(2)), "pairs that occur twice"),
        (changed("token_log_probs", put((1, 1), np.nan)), "log-probabilities that are none"),
        (changed("pair_log_probs", put((1, 1), 0.5)), "log-probabilities that are none"),
        (changed("pair_log_probs", put((1, 1), -np.inf)), "log-probabilities that are none"),
        (changed("token_ids", lambda ids: ids.astype(np.int64)), "found tensors .*it is damaged"),
        (changed("tokens", lambda tokens: tokens[:2]), "found tensors"),
        (changed("tokens", lambda tokens: tokens[:, None]), "found tensors"),
        (changed("token_ids", lambda ids: ids.reshape(-1)), "found tensors"),
        (changed("pair_ids", lambda ids: ids[:, :1]), "found tensors"),
        (without, "found tensors"),
        (extra, "found tensors"),
        (other_kind, "found kind 'heads' of version '1', expected 'speclm candidate memory'"),
        (newer, "of version '2', expected"),
        (nothing_about, "found kind None"),
    ],
)
def test_files_with_wrong_contents_are_refused(path, change, message):
    tensors, about = load_file(path), dict(ABOUT)
    save_file(tensors, path, about)
    load(path)
    change(tensors, about)
    save_file(tensors, path, about)
    with pytest.raises(CheckpointError, match=message):
        load(path)


def test_more_tokens_than_the_vocabulary_and_no_candidates_are_refused(path):
    for count, width in ((VOCAB + 1, 2), (3, 0), (3, 65)):
        tensors = {
            "tokens": np.arange(count, dtype=np.int32),
            "token_ids": np.zeros((count, width), np.int32),
            "token_log_probs": np.zeros((count, width), np.float16),
            "pairs": np.zeros(0, np.int64),
            "pair_ids": np.zeros((0, width), np.int32),
            "pair_log_probs": np.zeros((0, width), np.float16),
        }
        save_file(tensors, path, ABOUT)
        with pytest.raises(CheckpointError, match="of at most 9 tokens and 64 candidates"):
            load(path)


def header(**tensors):
    text = json.dumps({"__metadata__": ABOUT, **tensors}).encode()
    return struct.pack("<Q", len(text)) + text


HUGE = {"dtype": "I64", "shape": [2**60], "data_offsets": [0, 2**63 - 8]}
TWICE = header(pairs={"dtype": "I64", "shape": [0], "data_offsets": [0, 0]}).replace(
    b'"pairs"', b'"pairs": {"dtype": "I64", "shape": [0], "data_offsets": [0, 0]}, "pairs"'
)


@pytest.mark.parametrize(
    "content",
    [b"", b"PK\3\4", b"\xff" * 64, struct.pack("<Q", 2**62), header(pairs=HUGE), TWICE, header()],
    ids=["empty", "zip", "noise", "long header", "huge tensor", "name twice", "no tensor"],
)
def test_files_of_something_else_are_refused(path, content):
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="speclm warm"):
        load(path)


def test_files_that_cannot_be_read_or_written_are_named(path, tmp_path):
    for wrong in (tmp_path / "none", tmp_path, "a\0b", "x" * 5000):
        with pytest.raises(CheckpointError, match=r"expected a .*memory"):
            load(wrong)
    memory = load(path)
    memory.store([1], [1], np.array([[1, 2]]), np.zeros((1, 2)))
    for wrong in (tmp_path / "no" / "folder", tmp_path, "a\0b"):
        with pytest.raises(OptionError, match=r"cannot be written .*; name a file"):
            memory.save(wrong, fingerprint="f")
    assert memory.has_changed


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damaged_bytes_end_in_a_typed_error_or_a_memory(path, data):
    content = bytearray(path.read_bytes())
    damaged = path.with_name("damaged.safetensors")
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        for _ in range(data.draw(st.integers(1, 3))):
            index = data.draw(st.integers(0, len(content) - 1))
            content[index] = data.draw(st.integers(0, 255))
    damaged.write_bytes(content)
    try:
        memory = load(damaged)
    except CheckpointError:
        return
    found = [memory.find(previous, token) for previous in range(-1, VOCAB) for token in range(9)]
    assert all(0 <= token < VOCAB for answer in found if answer for token in answer[1])


def test_a_fingerprint_is_that_of_the_weights_wherever_they_are():
    model = build_model("llama")
    found = memory_fingerprint(model)
    rounded = build_model("llama").to(torch.bfloat16)
    assert memory_fingerprint(rounded) == memory_fingerprint(rounded.to(torch.float32)) == found
    model.config.name_or_path = "elsewhere"
    model.train()
    assert memory_fingerprint(model) == found == memory_fingerprint(shared_model("llama"))


def test_other_weights_and_vocabularies_have_other_fingerprints():
    models = [
        build_model("llama"),
        build_model("llama", seed=1),
        build_model("llama", vocab_size=168),
        build_model("qwen2"),
        build_model("bloom"),
    ]
    tuned = build_model("llama")
    with torch.no_grad():
        tuned.model.layers[1].mlp.up_proj.weight.mul_(1.5)
    assert len({memory_fingerprint(model) for model in [*models, tuned]}) == 6
