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


def test_setting_without_key_or_value_is_refused():
    for text in ("seed", "=3"):
        with pytest.raises(OptionError, match=f"training argument is '{text}', expected key=value"):
            parse_settings([text])


def test_defaults_of_a_method_lie_between_those_of_all_and_the_settings(tmp_path):
    defaults = {"learning_rate": 1e-4, "adam_beta2": 0.95}
    arguments = training_arguments(tmp_path, {"adam_beta2": 0.9}, defaults=defaults)
    assert (arguments.learning_rate, arguments.adam_beta2) == (1e-4, 0.9)
    assert arguments.num_train_epochs == 2


REFUSED = [
    *({"learning_rate": value} for value in (float("nan"), float("inf"), -1e-3, 0.0, "fast", None)),
    *({"num_train_epochs": value} for value in (float("nan"), 0.0, None)),
    {"per_device_train_batch_size": 0},
    {"per_device_eval_batch_size": 2.5},
    {"gradient_accumulation_steps": -1},
    {"max_steps": "ten"},
    {"seed": -1},
    {"weight_decay": float("nan")},
    {"max_grad_norm": -1.0},
    {"warmup_steps": "many"},
]
EXPECTED = {
    "learning_rate": "expected a finite number above 0",
    "num_train_epochs": "expected a finite number above 0",
    "per_device_train_batch_size": "expected 1 to",
    "per_device_eval_batch_size": "a float",
    "gradient_accumulation_steps": "expected 1 to",
    "max_steps": "a str, expected a whole number",
    "seed": "expected 0 to",
    "weight_decay": "expected 0.0 to",
    "max_grad_norm": "expected 0.0 to",
    "warmup_steps": "a str, expected a number",
}


def test_numbers_that_no_training_can_have_are_named(tmp_path):
    for settings in REFUSED:
        ((name, value),) = settings.items()
        with pytest.raises(OptionError, match=f"{name} is {value!r}, {EXPECTED[name]}"):
            training_arguments(tmp_path, settings)


def test_epochs_do_not_matter_where_steps_are_given(tmp_path):
    arguments = training_arguments(tmp_path, {"max_steps": 3, "num_train_epochs": 0})
    assert arguments.max_steps == 3


def test_switches_are_true_or_false_and_counts_whole_numbers(tmp_path):
    for value in ("maybe", "False", 1, None):
        with pytest.raises(OptionError, match=r"bf16 is .*, expected true or false"):
            training_arguments(tmp_path, {"bf16": value})
    assert training_arguments(tmp_path, {"bf16": False, "tf32": None}).bf16 is False
    with pytest.raises(OptionError, match="ddp_timeout is 'long', expected a whole number"):
        training_arguments(tmp_path, {"ddp_timeout": "long"})


def test_tracker_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "speclm.training.arguments.get_available_reporting_integrations", lambda: ["mlflow"]
    )
    for name in ("tensorboard", "wandb"):
        for report_to in (name, ["mlflow", name]):
            with pytest.raises(OptionError, match=rf"'{name}'.* not installed .*install {name}"):
                training_arguments(tmp_path, {"report_to": report_to})


def test_unknown_tracker_is_named_with_those_that_are_known(tmp_path):
    for report_to, words in (
        ("wandbb", r"did you mean 'wandb'\?"),
        (["none", "mlflow"], "'none' by itself"),
        ("", "''"),
        (None, "None"),
    ):
        with pytest.raises(OptionError, match=rf"report_to has .*'tensorboard'.*{words}|{words}.*"):
            training_arguments(tmp_path, {"report_to": report_to})


def test_no_tracker_is_a_choice(tmp_path):
    for report_to in ("none", ["none"], []):
        assert training_arguments(tmp_path, {"report_to": report_to}).report_to == []


def test_file_of_settings_that_is_not_there_is_named(tmp_path):
    with pytest.raises(OptionError, match=r"refuses .*'accelerator_config': 'none\.json'"):
        training_arguments(tmp_path, {"accelerator_config": "none.json"})
