"""Writing hidden states once: what a training with them computes, and what is refused."""

import errno
import json
import os
import shutil
from collections import namedtuple
from itertools import count

import pytest
import torch

from speclm.errors import FeatureError, OptionError
from speclm.methods.medusa.training import MedusaTrainingModel
from speclm.training import feature_writer
from speclm.training.feature_cache import MANIFEST_NAME, FeatureCache
from speclm.training.feature_writer import plan_features, release_decoder
from tests.training.cached import (
    METHODS,
    NEAR,
    SHARD_BYTES,
    deep_base,
    random_texts,
    trainer_of,
    training_model,
    written,
)
from tests.training.runs import CLOSE


@pytest.fixture
def medusa():
    return training_model("medusa", deep_base())


@pytest.fixture
def plan(medusa, tmp_path):
    def make(model=medusa, data=None, folder=tmp_path / "features"):
        return plan_features(model, [data or random_texts()], folder, shard_bytes=SHARD_BYTES)

    return make


@pytest.mark.parametrize("method", METHODS)
def test_training_from_features_has_the_losses_of_training_with_the_base(method, tmp_path):
    data, losses = random_texts(), []
    for is_cached in (False, True):
        trainer = trainer_of(training_model(method, deep_base()), tmp_path / "out", data)
        model = trainer.training_model
        if is_cached:
            trainer.use_features(written(model, trainer.cacheable_datasets(), tmp_path / "cache"))
            release_decoder(model)
            assert sum(p.numel() for p in model.view.decoder.parameters()) == 25 * 16  # no layer
        trainer.train()
        logs = trainer.state.log_history
        losses.append([log.get("loss", log.get("eval_loss")) for log in logs[:-1]])
    assert losses[0] == pytest.approx(losses[1], rel=CLOSE)
    assert len(losses[0]) == 6  # an evaluation after each epoch
    with pytest.raises(FeatureError, match="asked to run and its layers were released"):
        model.run_base(torch.tensor([[1]]), torch.tensor([[1]]), (-1,))


def test_writing_goes_on_after_the_last_whole_file(plan, medusa, tmp_path):
    first = plan()
    assert len(first.missing) > 2
    first.prepare()
    steps = count(1)

    def kill(_):
        if next(steps) > 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        first.write(medusa, batch_size=1, progress=kill)
    kept = {path: path.stat().st_ino for path in first.folder.glob("*.safetensors")}
    assert kept
    (first.folder / ".writing-0123").write_bytes(b"part")  # of a process that was killed
    with pytest.raises(FeatureError, match=r"lacks \d of \d files of features.*goes on where it"):
        FeatureCache(first.folder)
    second = plan()
    assert len(second.missing) == len(first.missing) - len(kept)
    assert second.num_bytes < first.num_bytes
    second.prepare()
    for index in range(2):  # as two processes
        second.write(medusa, batch_size=4, process=(index, 2))
    assert {path: path.stat().st_ino for path in kept} == kept
    assert not list(first.folder.glob(".writing-*"))
    assert plan().missing == ()
    assert plan().num_bytes == 0
    whole = written(medusa, [random_texts()], tmp_path / "whole")
    for example in random_texts():
        found = FeatureCache(first.folder).states(example["input_ids"])
        expected = whole.states(example["input_ids"])
        torch.testing.assert_close(found, expected, atol=NEAR, rtol=0)


def test_damaged_file_is_written_again(plan, medusa):
    first = plan()
    first.prepare()
    first.write(medusa, batch_size=4)
    path = first.manifest.shard_path(first.folder, 1)
    path.write_bytes(path.read_bytes()[:-4])
    assert plan().missing == (1,)


def test_full_disk_is_named_and_leaves_no_part_of_a_file(plan, medusa, monkeypatch):
    first = plan()
    usage = namedtuple("usage", "free")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage(first.num_bytes - 1))
        with pytest.raises(FeatureError, match=r"features need 0\.0 MB and 0\.0 MB are free; name"):
            first.prepare()
    first.prepare()

    def fail_with(number):
        def fail(_):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr("speclm.files.atomic.os.fsync", fail)

    fail_with(errno.ENOSPC)
    with pytest.raises(FeatureError, match=r"cannot be written \(OSError.*No space.*; free space"):
        first.write(medusa, batch_size=4)
    assert [path.name for path in first.folder.iterdir()] == [MANIFEST_NAME]
    fail_with(errno.EACCES)
    with pytest.raises(FeatureError, match="; name a folder that you may write to"):
        first.write(medusa, batch_size=4)


def test_features_of_another_training_are_refused_with_the_difference(plan, medusa):
    plan().prepare()
    other = deep_base()
    with torch.no_grad():
        other.model.layers[3].mlp.up_proj.weight[2, 2] += 1
    cases = {
        "the base was LlamaForCausalLM and is LlamaForCausalLM with other weights": {
            "model": training_model("medusa", other)
        },
        r"the data was 8 texts with the hash \w{8} and is 5 with \w{8}": {"data": random_texts(6)},
        r"layers was \(-1,\) and is \(2, 3, 4, -1\)": {
            "model": training_model("eagle3", deep_base())
        },
        "dtype was 'float32' and is 'bfloat16'": {
            "model": training_model("medusa", deep_base().bfloat16())
        },
    }
    for words, changes in cases.items():
        with pytest.raises(FeatureError, match=f"those of another training: .*{words}.*; name an"):
            plan(**changes)


def test_what_cannot_be_cached_is_refused(plan, medusa, tmp_path):
    class Tuned(MedusaTrainingModel):
        layers_read = None

    with pytest.raises(OptionError, match="Tuned does not learn from hidden states of a frozen"):
        plan(Tuned(medusa.view.model, medusa.heads))
    with pytest.raises(OptionError, match="data is a generator without a length"):
        plan(data=(example for example in random_texts()))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("")
    with pytest.raises(FeatureError, match="holds other files, expected an empty folder or one of"):
        plan(folder=tmp_path / "mine")


def test_other_texts_or_layers_than_those_of_the_training_are_not_read(medusa, tmp_path):
    cache = written(medusa, [random_texts()], tmp_path / "features")
    trainer = trainer_of(medusa, tmp_path / "out", random_texts())
    with pytest.raises(FeatureError, match="lacks the features of 3 texts, expected those of all"):
        trainer.use_features(cache)  # not those to evaluate on
    trainer = trainer_of(training_model("eagle3", deep_base()), tmp_path / "out", random_texts())
    with pytest.raises(FeatureError, match=r"hidden states \(-1,\), expected \(2, 3, 4, -1\)"):
        trainer.use_features(cache)


def test_each_text_is_stored_once_and_files_have_about_the_size_that_is_asked_for(plan):
    manifest = plan().manifest
    assert (manifest.num_texts, sum(manifest.shards)) == (8, 8)
    assert manifest.num_tokens == sum(random_texts().lengths[:-1])
    assert feature_writer._cut([4, 4, 9, 1], 8) == (2, 1, 1)
    plan().prepare()
    record = json.loads((plan().folder / MANIFEST_NAME).read_text())
    assert record["shards"] == list(manifest.shards)
