import json
import re
import shutil
import signal
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from speclm.demo.bundle import load_prompts
from speclm.errors import CheckpointError, FeatureError, OptionError
from speclm.methods.block.checkpoint import read_block
from speclm.methods.eagle.checkpoint import read_eagle
from speclm.methods.medusa.checkpoint import read_medusa
from speclm.methods.mtp.checkpoint_writing import read_layers
from speclm.training.heads_trainer import HeadsTrainer
from speclm.training.history import read_history
from tests.methods.mtp.mtp_bases import ONE, make_base
from tests.models import build_model
from tests.training.alphabet import TAGGED, WORDS, word_tokenizer, write_alphabet

SETTINGS = ("use_cpu=true", "logging_steps=1", "max_steps=2", "save_steps=2")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("train") / "base"
    build_model("llama", num_hidden_layers=7, vocab_size=len(WORDS)).save_pretrained(folder)
    word_tokenizer(TAGGED).save_pretrained(folder)
    return folder


@pytest.fixture
def options(base, tmp_path):
    data = write_alphabet(tmp_path / "rows.jsonl")
    return {"--base": base, "--data": data, "--out": tmp_path / "heads", "--batch-size": 4}


@pytest.fixture
def train(run, options):
    def run_train(recipe, *flags, settings=SETTINGS, **changes):
        named = {**options, **{f"--{k.replace('_', '-')}": v for k, v in changes.items()}}
        words = [str(word) for pair in named.items() for word in pair]
        words += [word for setting in settings for word in ("--training-arg", setting)]
        return run("train", recipe, *words, *flags)

    return run_train


@pytest.fixture(autouse=True)
def draws_nothing(request, monkeypatch):
    """Draw no curves, which takes a while, except where they are looked at."""
    if "draws" not in request.fixturenames:
        monkeypatch.setattr("speclm.training.history.has_plots", lambda: False)


@pytest.fixture
def draws():
    """Let the trainings of a test draw their curves."""


@pytest.fixture
def loads_nothing(monkeypatch):
    def load(_):
        raise AssertionError("the base was loaded")

    monkeypatch.setattr("speclm.cli._training.load", load)


@pytest.mark.usefixtures("draws")
def test_heads_are_trained_and_their_figures_printed(train, options):
    flags = ("--own-lm-head", "--device", "cpu")
    settings = ("logging_steps=1",)
    changes = {"epochs": 1, "eval_data": options["--data"], "limit": 8, "num_heads": 2}
    result = train("medusa", *flags, settings=settings, **changes)
    assert result.exit_code == 0
    assert "estimated tau (tokens per target forward) on the evaluation data" in result.output
    marked = r"marked in the first example: '[b-z ]+' to '[b-z ]+ <end>'"
    assert re.search(marked, result.output)
    assert "trained: " in result.output
    assert "8 examples, 88 tokens that count; 2 optimizer steps" in result.output
    assert "top-3" in result.output
    assert "step 2" in result.output
    assert any(options["--out"].glob("*.safetensors"))
    assert any(options["--out"].glob("checkpoint-2"))
    history = read_history(options["--out"])
    assert (history.recipe, history.steps, history.data["examples"]) == ("medusa", 2, 8)
    assert (options["--out"] / "curves.png").is_file()


def test_training_that_is_shorter_than_every_interval_prints_its_table(train, options, tmp_path):
    settings = ("use_cpu=true", "max_steps=2", "logging_steps=50")
    result = train("medusa", num_heads=2, settings=settings)
    assert "estimated tau (tokens per target forward) on the last batches" in result.output
    assert "head1" in result.output
    settings = (*settings, "eval_strategy=steps", "eval_steps=50")
    changes = {"eval_data": options["--data"], "out": tmp_path / "evaluated"}
    result = train("medusa", num_heads=2, settings=settings, **changes)
    assert "on the evaluation data" in result.output
    assert "step 2" in result.output


def test_answers_end_where_the_base_stops(train, monkeypatch):
    stop = WORDS.index("l")  # in ten of the answers, from the first to the tenth token
    monkeypatch.setattr("speclm.cli._training.eos_token_ids", lambda base: {stop})
    assert "12 examples, 77 tokens that count" in train("medusa", num_heads=1).output


def test_heads_of_eagle3_draft_from_a_vocabulary_of_the_data(train, options):
    result = train("eagle3", num_steps=3, draft_vocab_size=8)
    assert result.exit_code == 0
    assert [f"step{step}" in result.output for step in range(4)] == [True, True, True, False]
    saved = read_eagle(options["--out"])
    assert (saved.config.kind, saved.config.draft_vocab_size) == ("eagle3", 8)
    assert saved.base_name_or_path is None  # a path of this machine


def test_heads_of_eagle_are_trained_on_one_step_and_measured_on_more(train, options):
    result = train("eagle", eval_data=options["--data"])
    assert "on the evaluation data" in result.output
    step4 = next(line for line in result.output.splitlines() if "step4" in line and "│" in line)
    assert step4.split("│")[2].strip() == "-"  # no loss
    assert read_eagle(options["--out"]).config.kind == "eagle"


def test_heads_that_are_loaded_keep_their_vocabulary(train, options, tmp_path):
    train("eagle3", draft_vocab_size=8, num_steps=2)
    first = read_eagle(options["--out"])
    other = write_alphabet(tmp_path / "others.jsonl", num_rows=2)  # with other tokens
    train("eagle3", init=options["--out"], out=tmp_path / "more", data=other, num_steps=2)
    second = read_eagle(tmp_path / "more")
    assert second.tensors["draft_columns"].equal(first.tensors["draft_columns"])
    assert not second.tensors["fc.weight"].equal(first.tensors["fc.weight"])
    with pytest.raises(OptionError, match=r"are heads of eagle3, expected eagle; train them with"):
        train("eagle", init=options["--out"], out=tmp_path / "third")


def test_block_heads_are_trained_new_and_from_saved_ones(train, options, tmp_path):
    result = train("block", num_layers=1, block_size=4, draft_vocab_size=8)
    assert result.exit_code == 0
    first = read_block(options["--out"], num_target_layers=7)
    assert (first.config.num_layers, first.config.num_drafts) == (1, 4)
    assert (first.config.draft_vocab_size, first.config.markov) == (8, "vanilla")
    assert first.base_name_or_path is None  # a path of this machine
    train("block", init=options["--out"], out=tmp_path / "more", token_weight=1, distance_weight=0)
    second = read_block(tmp_path / "more")
    assert second.config == first.config
    assert not second.tensors["fc.weight"].equal(first.tensors["fc.weight"])


def test_medusa_heads_are_trained_from_saved_ones(train, options, tmp_path):
    train("medusa", num_heads=2)
    train("medusa", init=options["--out"], out=tmp_path / "more")
    first, second = read_medusa(options["--out"]), read_medusa(tmp_path / "more")
    assert second.num_heads == 2
    assert not second.stacked()["weight"].equal(first.stacked()["weight"])


def test_draft_models_are_distilled_new_and_from_saved_ones(train, options, tmp_path):
    changes = {"hidden_size": 32, "num_heads": 2, "num_layers": 1}
    result = train("draft", eval_data=options["--data"], **changes)
    assert "estimated tau (tokens per target forward) on the evaluation data" in result.output
    assert f"the draft model is in {options['--out']}" in result.output
    train("draft", init=options["--out"], out=tmp_path / "more", token_weight=0.5)
    config = json.loads((tmp_path / "more" / "config.json").read_text())
    assert (config["hidden_size"], config["num_hidden_layers"]) == (32, 1)
    assert (tmp_path / "more" / "tokenizer.json").is_file()


def test_base_is_tuned_with_its_heads_and_its_loss_printed(train, options):
    changes = {"num_heads": 2, "rank": 4, "heads_warmup": 1, "output": "merged"}
    result = train("medusa2", eval_data=options["--data"], **changes)
    assert "loss of the base on the same data: " in result.output
    assert f"draft for the merged base in {options['--out'] / 'base'}" in result.output
    assert (options["--out"] / "base" / "tokenizer.json").is_file()
    assert read_medusa(options["--out"]).num_heads == 2


def test_interrupted_training_saves_a_checkpoint_and_goes_on_from_it(train, options, monkeypatch):
    settings = ("use_cpu=true", "logging_steps=1", "max_steps=3", "save_steps=3")
    changes = {"eval_data": options["--data"], "patience": 1}
    log = HeadsTrainer.log

    def log_and_interrupt(trainer, logs, *rest):
        log(trainer, logs, *rest)
        if trainer.state.global_step == 1:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(HeadsTrainer, "log", log_and_interrupt)
        result = train("medusa", settings=settings, **changes)
    assert result.exit_code == 130
    assert "interrupted after step 2 of 3; to go on, run the same command with" in result.output
    assert not any(options["--out"].glob("*.safetensors"))
    state = (options["--out"] / "checkpoint-2" / "trainer_state.json").read_text()
    assert "eval_loss" not in state  # which patience would count, in the middle of an epoch
    with pytest.raises(CheckpointError, match=r"differs: decay was 0\.8 and is 0\.5; resume with"):
        train("medusa", "--resume", settings=settings, **changes, decay=0.5)
    result = train("medusa", "--resume", settings=settings, **changes)
    assert result.exit_code == 0
    assert "step 3" in result.output
    assert any(options["--out"].glob("checkpoint-3"))


def test_patience_ends_a_training_until_it_is_resumed_with_more(train, options):
    settings = ("use_cpu=true", "logging_steps=4")
    changes = {"epochs": 9, "patience": 1, "learning_rate": 1e-12, "eval_data": options["--data"]}
    result = train("medusa", settings=settings, num_heads=1, **changes)
    assert "step 6" in result.output  # of 27; the second epoch was no better
    (heads,) = options["--out"].glob("*.safetensors")
    first, last_log = heads.read_bytes(), read_history(options["--out"]).log[-2]
    assert last_log["estimated_tau"] > 1
    moved = options["--out"].rename(options["--out"].with_name("moved"))
    heads, options["--out"] = moved / heads.name, moved
    result = train("medusa", "--resume", settings=settings, num_heads=1, **changes)
    words = "had ended at step 6, after 1 evaluations without a better estimated_tau; for more"
    assert words in result.output
    assert not any(options["--out"].glob("checkpoint-9"))
    assert heads.read_bytes() == first
    assert last_log in read_history(moved).log
    changes["patience"] = 2
    result = train("medusa", "--resume", settings=settings, num_heads=1, **changes)
    assert "had ended" not in result.output
    assert "step 9" in result.output


def test_features_are_cached_after_a_confirmation_and_read_again(
    train, options, tmp_path, monkeypatch
):
    cached = {"cache_features": tmp_path / "features", "num_steps": 2}
    with pytest.raises(OptionError, match=r"would write 0\.1 MB to .* no terminal.*pass --yes"):
        train("eagle3", **cached)
    terminal = SimpleNamespace(stdin=SimpleNamespace(isatty=lambda: True))
    with monkeypatch.context() as patch:
        patch.setattr("speclm.cli._features.sys", terminal)
        result = train("eagle3", **cached)
    assert "write 0.1 MB? [y/N]" in result.output
    assert result.exit_code == 1
    assert not list((tmp_path / "features").glob("*"))
    result = train("eagle3", "--yes", **cached)
    assert "cached features: 0.1 MB are to be written to" in result.output
    assert "step1" in result.output
    result = train("eagle3", **cached, out=tmp_path / "second")
    assert "cached features: all 1 files are in" in result.output
    with pytest.raises(FeatureError, match="the data was 12 texts with the hash"):
        train("eagle3", **cached, out=tmp_path / "third", limit=8)
    with pytest.raises(OptionError, match="--cache-features and --out are both"):
        train("eagle3", cache_features=tmp_path / "fourth", out=tmp_path / "fourth")


def test_folders_of_others_are_not_overwritten(train, options):
    with pytest.raises(CheckpointError, match="save the heads into a folder of their own"):
        train("eagle3", out=options["--base"])
    (options["--out"] / "checkpoint-2").mkdir(parents=True)
    with pytest.raises(OptionError, match="holds checkpoints of another training; pass --resume"):
        train("medusa")


REFUSED = {
    "medusa": [
        ({"learning_rate": "nan"}, "--learning-rate is nan, expected a finite number above 0"),
        ({"learning_rate": "-0.1"}, "--learning-rate is -0.1"),
        ({"epochs": "0"}, "--epochs is 0.0, expected a finite number above 0"),
        ({"num_heads": "0"}, "--num-heads is 0, expected 1 to 64"),
        ({"num_layers": "0"}, "--num-layers is 0, expected 1 to"),
        ({"patience": "1"}, "--patience is 1 without --eval-data"),
        ({"decay": "nan"}, "decay is nan, expected 0.0 to 1.0"),
        ({"soft_weight": "2"}, "soft_weight is 2.0, expected 0.0 to 1.0"),
        ({"device": "cuda:1"}, "--device is 'cuda:1', expected a kind of device"),
        ({"settings": ["max_step=2"]}, "did you mean 'max_steps'"),
        ({"settings": ["max_steps"]}, "expected key=value"),
        ({"settings": ["bf16=maybe"]}, "bf16 is 'maybe', expected true or false"),
        ({"settings": ["report_to=wandbb"]}, "'wandb'"),
        ({"init": "heads", "num_heads": 3}, "--num-heads is 3 next to --init 'heads'"),
        ({"init_revision": "v2"}, "--init-revision is .v2. without --init"),
    ],
    "medusa2": [
        ({"rank": 0}, "--rank is 0, expected 1 to 1024"),
        ({"output": "whole"}, "--output is 'whole', expected one of"),
        ({"distillation": 2}, "--distillation is 2.0, expected 0.0 to 1.0"),
        ({"soft_weight": "2"}, "soft_weight is 2.0, expected 0.0 to 1.0"),
    ],
    "draft": [
        ({"temperature": 0}, "--temperature is 0.0, expected a finite number above 0"),
        ({"token_weight": -1}, "--token-weight is -1.0, expected 0.0 to 1.0"),
        ({"hidden_size": 0}, "--hidden-size is 0, expected at least 1"),
        ({"init": "small", "num_layers": 2}, "--num-layers is 2 next to --init 'small'"),
    ],
    "block": [
        ({"kind": "eagle"}, "--kind is 'eagle', expected one of"),
        ({"block_size": 1}, "--block-size is 1, expected 2 to 64"),
        ({"init": "heads", "block_size": 4}, "--block-size is 4 next to --init 'heads'"),
    ],
    "eagle": [
        ({"noise": -1.0}, "noise is -1.0, expected 0.0 to"),
        ({"num_steps": 33}, "num_steps is 33, expected 1 to 32"),
    ],
    "eagle3": [
        ({"num_steps": 0}, "num_steps is 0, expected 1 to 32"),
        ({"num_layers": 0}, "--num-layers is 0, expected 1 to 64"),
        ({"draft_vocab_size": 0}, "--draft-vocab-size is 0, expected at least 1"),
        ({"init": "heads", "num_layers": 2}, "--num-layers is 2 next to --init 'heads'"),
        ({"init": "heads", "draft_vocab_size": 4}, "--draft-vocab-size is 4 next to --init"),
        ({"init_revision": "v2"}, "--init-revision is .v2. without --init"),
        ({"decay": "2"}, "decay is 2.0, expected 0.0 to 1.0"),
    ],
}


@pytest.mark.usefixtures("loads_nothing")
@pytest.mark.parametrize("recipe", REFUSED)
def test_bad_options_are_named_before_anything_is_loaded(train, options, recipe):
    for change, words in REFUSED[recipe]:
        with pytest.raises(OptionError, match=words):
            train(recipe, **change)
        assert not options["--out"].exists()


@pytest.mark.usefixtures("loads_nothing")
def test_features_are_not_cached_for_trainings_that_need_more(train, tmp_path):
    for recipe in ("draft", "medusa2"):
        with pytest.raises(OptionError, match=f"--cache-features is .*'{recipe}' needs more"):
            train(recipe, cache_features=tmp_path / "features")


@pytest.mark.usefixtures("loads_nothing")
def test_folder_that_cannot_be_written_to_is_named_before_anything_is_loaded(train, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OptionError, match=r"--out '.*/file/heads' cannot be written to"):
        train("medusa", out=tmp_path / "file" / "heads")


def test_what_only_the_trainer_or_the_base_refuses_is_named(train):
    with pytest.raises(OptionError, match=r"cannot begin with .*'adam_beta1=-3'.*Invalid beta"):
        train("medusa", "--training-arg", "adam_beta1=-3")
    with pytest.raises(OptionError, match="draft_vocab_size is 31, expected 1 to 30"):
        train("eagle3", draft_vocab_size=31)


def test_help_shows_the_options_that_a_recipe_declares(run):
    for recipe, own in (
        ("medusa", "--own-lm-head"),
        ("medusa2", "--heads-warmup"),
        ("draft", "--token-weight"),
        ("block", "--block-size"),
        ("eagle", "--noise"),
        ("eagle3", "--draft-v"),
    ):
        result = run("train", recipe, "--help")
        assert result.exit_code == 0
        assert own in result.output
        assert "--no-" not in result.output
        assert ("0.0001" in result.output) == recipe.startswith("eagle")
    assert "eagle3" in run("train").output


def test_the_base_answers_the_data_before_the_training(run, tmp_path):
    data, out = tmp_path / "rows.jsonl", tmp_path / "heads"
    rows = [
        {"messages": [*messages, {"role": "assistant", "content": "somebody else's answer"}]}
        for messages in load_prompts("sql_tune", limit=3)
    ]
    data.write_text("\n".join(map(json.dumps, rows)))
    command = ["train", "medusa", "--data", str(data), "--out", str(out), "--distill"]
    command += ["--limit", "2", "--eval-data", str(data), "--distill-tokens", "48"]
    command += ["--num-heads", "1", "--device", "cpu", "--threads", "1"]
    limits = ["--training-arg", "max_steps=1", "--training-arg", "save_steps=1"]
    result = run(*command, *limits)
    assert result.exit_code == 0, result.output
    assert "the base itself would write 100% of the answers' tokens (2 examples)" in result.output
    answers = (out / "distilled.jsonl").read_bytes()
    assert answers.count(b"SELECT") >= 2 > answers.count(b"somebody")
    assert (out / "distilled_eval.jsonl").read_bytes().count(b'"finish_reason": "stop"') == 3
    (out / "distilled.jsonl").write_bytes(answers.replace(b"SELECT", b"select"))
    with pytest.raises(CheckpointError, match="data"):
        run(*command, *limits, "--resume")  # answers are kept, and are those of the checkpoint
    (out / "distilled.jsonl").write_bytes(answers)
    data.write_text(data.read_text() + "\n" + json.dumps(rows[0]))
    shutil.rmtree(out / "checkpoint-1")
    with pytest.raises(CheckpointError, match="differs from what was answered"):
        run(*command, *limits, "--resume")
    assert (out / "distilled.jsonl").read_bytes() == answers


def test_mtp_layers_of_the_base_are_trained_and_put_into_a_copy_of_it(
    train, run, options, tmp_path
):
    base, out, whole = make_base(tmp_path / "mtp", ONE).folder, options["--out"], tmp_path / "whole"
    word_tokenizer(TAGGED).save_pretrained(base)
    result = train("mtp", base=base, num_steps=2, eval_data=options["--data"])
    assert "estimated tau (tokens per target forward) on the evaluation data" in result.output
    assert [f"step{step}" in result.output for step in (1, 4, 5)] == [True, True, False]
    assert read_history(out).recipe == "mtp"
    before = load_file(base / "model.safetensors")
    tuned = read_layers(out).tensors
    same = {key for key, tensor in tuned.items() if torch.equal(before[key], tensor)}
    assert same == {"model.layers.2.mlp.gate.e_score_correction_bias"}  # has no gradient
    converted = run("convert", str(out), "--to", "whole", "--base", str(base), "--out", str(whole))
    assert "mtp heads, speclm -> whole" in converted.output
    assert '"method": "mtp"' in converted.output
    assert "model.safetensors" in run("push", str(out), "me/layers", "--dry-run").output
    train("mtp", base=whole, out=tmp_path / "more", init=out)
    assert read_layers(tmp_path / "more").tensors.keys() == tuned.keys()
    with pytest.raises(CheckpointError, match="the base comes without MTP layers"):
        train("mtp", out=tmp_path / "none")
    with pytest.raises(OptionError, match="decay is 2"):
        train("mtp", decay=2, out=tmp_path / "none")
