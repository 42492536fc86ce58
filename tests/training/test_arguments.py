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


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e-3, 0.0, "fast", None])
@pytest.mark.parametrize("name", ["learning_rate", "num_train_epochs"])
def test_rates_and_epochs_are_positive_and_finite(tmp_path, name, value):
    with pytest.raises(OptionError, match=f"{name} is .*, expected a finite number above 0"):
        training_arguments(tmp_path, {name: value})


def test_epochs_do_not_matter_where_steps_are_given(tmp_path):
    arguments = training_arguments(tmp_path, {"max_steps": 3, "num_train_epochs": 0})
    assert arguments.max_steps == 3


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size is 0, expected 1 to"),
        ({"per_device_eval_batch_size": 2.5}, "per_device_eval_batch_size is 2.5, a float"),
        ({"gradient_accumulation_steps": -1}, "gradient_accumulation_steps is -1, expected 1 to"),
        ({"max_steps": "ten"}, "max_steps is 'ten', a str, expected a whole number"),
        ({"seed": -1}, "seed is -1, expected 0 to"),
        ({"weight_decay": float("nan")}, "weight_decay is nan, expected 0.0 to"),
        ({"max_grad_norm": -1.0}, "max_grad_norm is -1.0, expected 0.0 to"),
        ({"warmup_steps": "many"}, "warmup_steps is 'many', a str, expected a number"),
    ],
)
def test_numbers_that_no_training_can_have_are_named(tmp_path, settings, words):
    with pytest.raises(OptionError, match=words):
        training_arguments(tmp_path, settings)


@pytest.mark.parametrize("value", ["maybe", "False", 1, None])
def test_switches_are_true_or_false(tmp_path, value):
    with pytest.raises(OptionError, match=r"bf16 is .*, expected true or false"):
        training_arguments(tmp_path, {"bf16": value})
    assert training_arguments(tmp_path, {"bf16": False, "tf32": None}).bf16 is False


def test_counts_are_whole_numbers(tmp_path):
    with pytest.raises(OptionError, match="ddp_timeout is 'long', expected a whole number"):
        training_arguments(tmp_path, {"ddp_timeout": "long"})


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_tracker_that_is_not_installed_is_named(tmp_path, monkeypatch, name):
    monkeypatch.setattr(
        "speclm.training.arguments.get_available_reporting_integrations", lambda: ["mlflow"]
    )
    for report_to in (name, ["mlflow", name]):
        with pytest.raises(OptionError, match=rf"'{name}'.* not installed .*pip install {name}"):
            training_arguments(tmp_path, {"report_to": report_to})


@pytest.mark.parametrize(
    ("report_to", "words"),
    [
        ("wandbb", r"did you mean 'wandb'\?"),
        (["none", "mlflow"], "'none' by itself"),
        ("", "''"),
        (None, "None"),
    ],
)
def test_unknown_tracker_is_named_with_those_that_are_known(tmp_path, report_to, words):
    with pytest.raises(OptionError, match=rf"report_to has .*'tensorboard'.*{words}|{words}.*"):
        training_arguments(tmp_path, {"report_to": report_to})


@pytest.mark.parametrize("report_to", ["none", ["none"], []])
def test_no_tracker_is_a_choice(tmp_path, report_to):
    assert training_arguments(tmp_path, {"report_to": report_to}).report_to == []


def test_file_of_settings_that_is_not_there_is_named(tmp_path):
    with pytest.raises(OptionError, match=r"refuses .*'accelerator_config': 'none\.json'"):
        training_arguments(tmp_path, {"accelerator_config": "none.json"})
