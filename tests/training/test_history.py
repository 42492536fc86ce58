"""What a training leaves next to its heads, and what is read back."""

import io

import pytest
from PIL import Image

from speclm.errors import CheckpointError
from speclm.files.atomic import write_json
from speclm.methods.medusa.training import MedusaTrainingModel, new_medusa_heads
from speclm.training import history
from speclm.training.arguments import training_arguments
from speclm.training.dataset import load_examples
from speclm.training.heads_trainer import HeadsTrainer
from speclm.training.history import draw_curves, read_history, write_history
from tests.training.alphabet import TAGGED, tiny_base, word_tokenizer, write_alphabet
from tests.training.runs import SETTINGS

OPTIONS = {"num_heads": 2, "init": "/home/me/heads", "other": "org/heads"}


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    folder, base = tmp_path_factory.mktemp("training"), tiny_base()
    base.config._name_or_path, base.config._commit_hash = "org/base", "2" * 40
    examples = load_examples(write_alphabet(folder / "rows.jsonl"), word_tokenizer(TAGGED))
    trained = HeadsTrainer(
        MedusaTrainingModel(base, new_medusa_heads(base, num_heads=2)),
        training_arguments(
            folder / "out", {**SETTINGS, "max_steps": 2, "eval_strategy": "steps", "eval_steps": 1}
        ),
        train_dataset=examples,
        eval_dataset=examples,
    )
    trained.options = OPTIONS
    trained.train()
    trained.save_model()
    write_history(trained, base=base, recipe="medusa")
    return trained


@pytest.fixture
def folder(trainer):
    return history.Path(trainer.args.output_dir)


def test_recipe_is_written_without_paths_of_this_machine(folder, trainer):
    found = read_history(folder)
    assert (found.recipe, found.base, found.steps) == ("medusa", "org/base", 2)
    assert found.facts["commit of the base"] == found.base_commit == "2" * 40
    assert found.options == {"num_heads": 2, "init": None, "other": "org/heads"}
    assert found.facts["options"] == "num_heads=2, other=org/heads"
    assert (found.facts["examples"], found.facts["examples of a step"]) == (12, 4)
    assert found.facts["epochs"] == pytest.approx(2 / 3, abs=0.01)
    assert found.facts["learning rate"] == "0.001, cosine"
    assert found.log == trainer.state.log_history
    assert "/home" not in (folder / "training.json").read_text()
    assert str(folder.parent) not in (folder / "training.json").read_text()


def test_last_estimates_are_told_apart_by_their_data(folder, trainer):
    logs = trainer.state.log_history
    found = read_history(folder).estimated_tau
    assert found["evaluation data"] == logs[-2]["eval_estimated_tau"]
    assert (
        found["training data"]
        == [log for log in logs if "estimated_tau" in log][-1]["estimated_tau"]
    )


def test_curves_are_drawn_of_any_history(folder):
    for chart in ((folder / "curves.png").read_bytes(), draw_curves([])):
        assert Image.open(io.BytesIO(chart)).format == "PNG"


def test_without_matplotlib_the_history_is_written_without_curves(trainer, folder, monkeypatch):
    (folder / "curves.png").unlink()
    monkeypatch.setattr(history, "has_plots", lambda: False)
    write_history(trainer, base=tiny_base(), recipe="medusa")
    assert not (folder / "curves.png").exists()
    assert read_history(folder).base is None  # it has no name


def test_folder_without_a_history_has_none(tmp_path):
    assert read_history(tmp_path) is None


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("nonsense", "cannot be read"),
        ("[]", r"found \[\], expected the history"),
        ({"steps": "2"}, "'steps' is '2'"),
        ({"log": [1]}, r"'log' is \[1\]"),
        ({"options": None}, "'options' is None"),
    ],
)
def test_damaged_history_is_named(tmp_path, content, words):
    whole = {"kind": "speclm training", "recipe": "medusa", "version": "1", "steps": 2}
    whole |= {"weights": "0a"}
    whole |= {"log": [], "options": {}, "data": {}, "arguments": {}}
    path = tmp_path / "training.json"
    if isinstance(content, dict):
        write_json(path, {**whole, **content})
    else:
        path.write_text(content)
    with pytest.raises(CheckpointError, match=words):
        read_history(tmp_path)
