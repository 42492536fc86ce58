import pytest

from speclm.errors import OptionError
from speclm.training.arguments import parse_settings, training_arguments


def test_any_field_goes_before_the_defaults(tmp_path):
    arguments = training_arguments(tmp_path, {"learning_rate": 0.5, "optim": "sgd"})
    assert (arguments.learning_rate, str(arguments.optim.value)) == (0.5, "sgd")
    assert arguments.num_train_epochs == 2
    assert arguments.report_to == []


def test_unknown_field_is_named_with_a_near_one(tmp_path):
    with pytest.raises(OptionError, match="no field 'learning_rat'; did you mean 'learning_rate'"):
        training_arguments(tmp_path, {"learning_rat": 1.0})
    with pytest.raises(OptionError, match="no field 'zzz'; see its documentation"):
        training_arguments(tmp_path, {"zzz": 1.0})


def test_refused_value_is_named(tmp_path):
    with pytest.raises(OptionError, match=r"refuses .*'save_strategy': 'often'.*correct the value"):
        training_arguments(tmp_path, {"save_strategy": "often"})


def test_settings_are_json_or_text():
    texts = ["seed=3", "bf16=true", "optim=sgd", "run_name=a=b", "max_grad_norm=1e-1"]
    assert parse_settings(texts) == {
        "seed": 3,
        "bf16": True,
        "optim": "sgd",
        "run_name": "a=b",
        "max_grad_norm": 0.1,
    }


@pytest.mark.parametrize("text", ["seed", "=3"])
def test_setting_without_key_or_value_is_refused(text):
    with pytest.raises(OptionError, match=f"training argument is '{text}', expected key=value"):
        parse_settings([text])
