"""Reading hidden states from disk: by any process, and only what was written."""

import json
import pickle

import pytest
import torch

from speclm.errors import FeatureError, UnsupportedModelError
from speclm.training.feature_cache import MANIFEST_NAME, STATES, FeatureCache, hash_base
from tests.training.cached import NEAR, deep_base, random_texts, training_model, written


@pytest.fixture
def model():
    return training_model("eagle3", deep_base())


@pytest.fixture
def cache(model, tmp_path):
    return written(model, [random_texts()], tmp_path / "features")


def damage(folder, change):
    """Change the bytes of the first file of features."""
    path = min(folder.glob("*.safetensors"))
    path.write_bytes(change(path.read_bytes()))


def test_batch_has_the_hidden_states_of_the_base_and_zeros_at_padding(cache, model):
    data = random_texts()
    batch = cache.collate([data[4], data[0]])
    expected = model.run_base(batch["input_ids"], batch["attention_mask"], (2, 3, 4, -1))
    is_token = batch["attention_mask"].bool()
    torch.testing.assert_close(batch[STATES][is_token], expected[is_token], atol=NEAR, rtol=0)
    assert not batch[STATES][~is_token].any()
    assert bool((~is_token).any())
    with model.given_states(batch[STATES]):
        _, last = model.read_base(batch["input_ids"], batch["attention_mask"], (-1,))
    assert last.equal(batch[STATES][..., -16:])


def test_process_that_loads_data_opens_the_files_by_itself(cache):
    content = pickle.dumps(cache)
    assert len(content) < 1000
    other, example = pickle.loads(content), random_texts()[3]
    assert other.collate([example])[STATES].equal(cache.collate([example])[STATES])


def test_damaged_features_are_refused_when_they_are_read(cache, tmp_path):
    tokens = random_texts()[0]["input_ids"]
    folder = tmp_path / "features"
    cache.states(tokens)

    def flip(content):
        length = int.from_bytes(content[:8], "little")
        place = 8 + length + json.loads(content[8 : 8 + length])["states"]["data_offsets"][0]
        return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]

    damage(folder, flip)
    texts = [example["input_ids"] for example in random_texts()]
    with pytest.raises(FeatureError, match=r"are damaged, expected the bytes that were written"):
        [FeatureCache(folder).states(text) for text in texts]
    damage(folder, lambda content: content[:-20])
    with pytest.raises(FeatureError, match=r"cannot be read .*delete the file, and compute them"):
        FeatureCache(folder)
    min(folder.glob("*.safetensors")).unlink()
    with pytest.raises(FeatureError, match=r"lacks 1 of \d files of features"):
        FeatureCache(folder)
    with pytest.raises(FeatureError, match="has no features of a text of 3 tokens"):
        cache.states([1, 2, 3])


def test_manifest_that_is_none_is_refused(cache, tmp_path):
    folder = tmp_path / "features"
    path = folder / MANIFEST_NAME
    good = json.loads(path.read_text())
    cases = {
        "[": "cannot be read",
        "[]": "has the version None",
        json.dumps({**good, "version": 2}): "has the version 2",
        json.dumps({**good, "shards": [10**9]}): "other types or sizes",
        json.dumps({**good, "width": "8"}): "other types or sizes",
        json.dumps({**good, "dtype": "nn"}): "dtype is 'nn', expected a type of PyTorch",
        json.dumps({**good, "width": 8}): r"expected \[tokens, 8\] of torch.float32",
    }
    for text, words in cases.items():
        path.write_text(text)
        with pytest.raises(FeatureError, match=words):
            FeatureCache(folder)


def test_hash_of_a_base_changes_with_any_weight_and_its_type(model):
    base = model.view.model
    before = hash_base(base)
    assert hash_base(deep_base()) == before
    with torch.no_grad():  # the same numbers in another order
        weight = base.model.layers[0].mlp.up_proj.weight
        weight[[0, 1]] = weight[[1, 0]]
    assert hash_base(base) != before
    assert hash_base(deep_base().bfloat16()) != before
    assert hash_base(deep_base(rms_norm_eps=1e-3)) != before
    base.model.layers[1].to("meta")
    with pytest.raises(UnsupportedModelError, match=r"layers\.1\..* is offloaded or partitioned"):
        hash_base(base)
