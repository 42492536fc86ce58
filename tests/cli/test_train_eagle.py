import pytest

from speclm.errors import CheckpointError, OptionError
from speclm.methods.eagle.checkpoint import read_eagle
from tests.models import build_model
from tests.training.alphabet import TAGGED, WORDS, word_tokenizer, write_alphabet


@pytest.fixture
def options(tmp_path):
    base = tmp_path / "base"
    build_model("llama", num_hidden_layers=7, vocab_size=len(WORDS)).save_pretrained(base)
    word_tokenizer(TAGGED).save_pretrained(base)
    data = write_alphabet(tmp_path / "rows.jsonl")
    return {"--base": base, "--data": data, "--out": tmp_path / "heads", "--batch-size": 4}


@pytest.fixture
def train(run, options):
    def run_train(kind, *flags, **changes):
        named = {**options, **{f"--{k.replace('_', '-')}": v for k, v in changes.items()}}
        words = [str(word) for pair in named.items() for word in pair]
        settings = ("use_cpu=true", "logging_steps=1", "max_steps=2", "save_steps=2")
        words += [word for setting in settings for word in ("--training-arg", setting)]
        return run("train", kind, *words, *flags)

    return run_train


def test_heads_of_eagle3_are_trained_and_their_figures_printed(train, options):
    result = train("eagle3", num_steps=3, draft_vocab_size=8)
    assert result.exit_code == 0
    assert "estimated tau on the last rows" in result.output
    assert [f"step{step}" in result.output for step in range(4)] == [True, True, True, False]
    saved = read_eagle(options["--out"])
    assert (saved.config.kind, saved.config.draft_vocab_size) == ("eagle3", 8)
    assert saved.base_name_or_path is None  # a path of this machine


def test_heads_of_eagle_are_trained_on_one_step_and_measured_on_more(train, options):
    result = train("eagle", eval_data=options["--data"], training_arg="eval_strategy=steps")
    assert "estimated tau on the evaluation rows" in result.output
    # A slow training shows its table more than once; the last one counts.
    step4 = [line for line in result.output.splitlines() if "step4" in line][-1]
    assert step4.split("│")[2].strip() == "-"  # no loss
    assert read_eagle(options["--out"]).config.kind == "eagle"


def test_heads_that_are_gone_on_from_keep_their_vocabulary(train, options, tmp_path):
    train("eagle3", draft_vocab_size=8, num_steps=2)
    first = read_eagle(options["--out"])
    other = write_alphabet(tmp_path / "others.jsonl", num_rows=2)  # with other tokens
    train("eagle3", init=options["--out"], out=tmp_path / "more", data=other, num_steps=2)
    second = read_eagle(tmp_path / "more")
    assert second.tensors["draft_columns"].equal(first.tensors["draft_columns"])
    assert not second.tensors["fc.weight"].equal(first.tensors["fc.weight"])
    with pytest.raises(OptionError, match=r"are heads of eagle3, expected eagle; train them with"):
        train("eagle", init=options["--out"], out=tmp_path / "third")


def test_resume_goes_on_where_a_training_ended(train, options):
    train("eagle3", num_steps=2)
    result = train("eagle3", "--resume", "--training-arg", "max_steps=3", num_steps=2)
    assert "step 3" in result.output


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_steps": 0}, "num_steps is 0, expected 1 to 32"),
        ({"num_layers": 0}, "--num-layers is 0, expected 1 to 64"),
        ({"draft_vocab_size": 0}, "--draft-vocab-size is 0, expected at least 1"),
        ({"init": "heads", "num_layers": 2}, "--num-layers is 2 next to --init 'heads'"),
        ({"init": "heads", "draft_vocab_size": 4}, "--draft-vocab-size is 4 next to --init"),
        ({"init_revision": "v2"}, "--init-revision is .v2. without --init"),
        ({"learning_rate": "nan"}, "--learning-rate is nan"),
        ({"decay": "2"}, "decay is 2.0, expected 0.0 to 1.0"),
    ],
)
def test_numbers_that_no_training_can_have_are_named_before_anything_is_loaded(
    train, change, words, monkeypatch
):
    def load(*_: object, **__: object) -> None:
        raise AssertionError("the base was loaded")

    monkeypatch.setattr("speclm.cli._training.load", load)
    with pytest.raises(OptionError, match=words):
        train("eagle3", **change)


def test_draft_vocabulary_beyond_the_base_is_refused(train):
    with pytest.raises(OptionError, match="draft_vocab_size is 31, expected 1 to 30"):
        train("eagle3", draft_vocab_size=31)


def test_folder_of_another_model_is_not_written_to(train, options):
    with pytest.raises(CheckpointError, match="save the heads into a folder of their own"):
        train("eagle3", out=options["--base"])


@pytest.mark.parametrize("kind", ["eagle", "eagle3"])
def test_help_shows_the_options(run, kind):
    result = run("train", kind, "--help")
    assert result.exit_code == 0
    assert ("--draft-vocab-size" in result.output) == (kind == "eagle3")
    assert ("--noise" in result.output) == (kind == "eagle")
    assert "0.0001" in result.output
