"""What the configs of all heads have in common; each method's own values are tested with it."""

from pathlib import Path

import pytest

from speclm.drafting.heads_config import (
    base_name,
    count_layers,
    log_differences,
    matrix_shape,
    merge_objects,
    require_same_config,
    require_types,
    vocabularies,
    width_of_heads,
)
from speclm.errors import CheckpointError

FILE = Path("heads/config.json")


def test_values_of_later_parts_win_and_nulls_are_left_out():
    config = {"a": 1, "b": 2, "c": None, "inner": {"b": 3, "d": None}, "absent": None}
    found = merge_objects(FILE, config, (None, "inner", "absent"))
    assert (found["a"], found["b"]) == (1, 3)
    assert not {"c", "d"} & set(found)
    with pytest.raises(CheckpointError, match="inner is 7, expected an object; correct it"):
        merge_objects(FILE, {"inner": 7}, ("inner",))


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("vocab_size", "9", "vocab_size is '9', expected int; correct it"),
        ("vocab_size", True, "vocab_size is True, expected int"),
        ("vocab_size", 2**40, "expected a number up to 2147483647"),
        ("rms_norm_eps", float("nan"), "rms_norm_eps is nan, expected a number up to"),
        ("layer_types", [1], "expected strings"),
    ],
)
def test_values_of_other_types_name_file_and_key(name, value, words):
    types = {"vocab_size": (int,), "rms_norm_eps": (int, float), "layer_types": (list,)}
    require_types(FILE, {"other": "anything"}, types)
    with pytest.raises(CheckpointError, match=words) as caught:
        require_types(FILE, {name: value}, types)
    assert "heads/config.json" in str(caught.value)


def test_sizes_come_from_the_tensors():
    shapes = {
        "layers.0.self_attn.q_norm.weight": (4,),
        "layers.1.mlp.up_proj.weight": (6, 3),
        "t2d": (20,),
        "d2t": (5,),
    }
    assert width_of_heads(FILE, shapes, {}, (16, 8)) == 4
    assert count_layers(FILE, shapes) == 2
    assert vocabularies(FILE, shapes, {"vocab_size": 9}) == (20, 5)
    assert matrix_shape(FILE, shapes, "layers.1.mlp.up_proj.weight") == (6, 3)
    with pytest.raises(CheckpointError, match=r"'t2d' has shape \[20\], expected a matrix"):
        matrix_shape(FILE, shapes, "t2d")


def test_differences_are_logged_or_refused(caplog):
    log_differences(FILE, {"hidden_size": 9, "other": 1}, {"hidden_size": 8, "num_layers": 1})
    assert "hidden_size 9 (found 8)" in caplog.text
    require_same_config(FILE, {"hidden_size": 9}, {"hidden_size": 9})
    with pytest.raises(CheckpointError, match="hidden_size reads back as 8, expected 9"):
        require_same_config(FILE, {"hidden_size": 9}, {"hidden_size": 8})


def test_base_is_named_by_either_library():
    assert base_name({"base_model_name_or_path": "org/a"}) == "org/a"
    assert base_name({"speculators_config": {"verifier": {"name_or_path": "org/b"}}}) == "org/b"
    assert base_name({"speculators_config": {"verifier": 3}}) is None
