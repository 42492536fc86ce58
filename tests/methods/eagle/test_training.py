from dataclasses import replace

import pytest
import torch

from speclm import SpecModel
from speclm.errors import DataError, OptionError, VocabularyMismatchError
from speclm.methods.eagle.checkpoint import read_eagle
from speclm.methods.eagle.config import EagleConfig
from speclm.methods.eagle.method import EagleRecipe
from speclm.methods.eagle.network import EagleHeads
from speclm.methods.eagle.objective import EagleObjective, EagleTrainingModel
from speclm.methods.eagle.training import (
    load_eagle_heads,
    new_eagle_heads,
)
from speclm.methods.medusa.training import MedusaTrainingModel, new_medusa_heads
from speclm.training.arguments import training_arguments
from speclm.training.conversations import Example
from speclm.training.dataset import ExampleDataset, choose_columns, count_tokens, load_examples
from speclm.training.heads_trainer import HeadsTrainer
from tests.models import build_model, prompts
from tests.training.alphabet import TAGGED, WORDS, word_tokenizer, write_alphabet
from tests.training.runs import CLOSE, SETTINGS, StopAt

KINDS = ("eagle", "eagle3")
NUM_LAYERS = 7  # the fewest with three different hidden states to read
DRAFT = 20  # of the 30 words
QUICK = {"learning_rate": 0.01, "lr_scheduler_type": "constant", "warmup_steps": 0}


def deep_base(num_layers=NUM_LAYERS, **settings):
    return build_model("llama", num_hidden_layers=num_layers, vocab_size=len(WORDS), **settings)


def objective_of(kind):
    if kind == "eagle":
        return replace(EagleObjective.usual(kind), num_measured=3)
    return EagleObjective(num_steps=3, num_measured=3)


def heads_of(base, rows, kind):
    counts = count_tokens(rows, vocab_size=len(WORDS))
    columns = choose_columns(counts, DRAFT) if kind == "eagle3" else None
    return new_eagle_heads(base, kind=kind, columns=columns)


@pytest.fixture
def rows(tmp_path):
    return load_examples(write_alphabet(tmp_path / "rows.jsonl"), word_tokenizer(TAGGED))


@pytest.fixture
def make(tmp_path, rows):
    def make_trainer(
        kind="eagle3",
        *,
        base=None,
        heads=None,
        folder="out",
        train_dataset=None,
        eval_dataset=None,
        callbacks=(),
        **settings,
    ):
        base = base or deep_base()
        arguments = training_arguments(
            tmp_path / folder, {**SETTINGS, **settings}, defaults=EagleRecipe.defaults
        )
        heads = heads or heads_of(base, rows, kind)
        return HeadsTrainer(
            EagleTrainingModel(base, heads, objective=objective_of(kind)),
            arguments,
            train_dataset=train_dataset or rows,
            eval_dataset=eval_dataset,
            callbacks=callbacks,
        )

    return make_trainer


@pytest.mark.parametrize("kind", KINDS)
def test_loss_falls_and_every_log_has_the_figures_of_each_step(make, kind):
    trainer = make(kind, max_steps=15, **QUICK)
    trainer.train()
    first, last = trainer.state.log_history[0], trainer.state.log_history[-2]
    assert last["loss"] < 0.9 * first["loss"]
    figures = {f"step{step}_top{top}" for step in (0, 1, 2) for top in (1, 2, 3)}
    assert {*figures, "step0_loss", "estimated_tau"} <= set(last)
    assert ("step2_loss" in last) == (kind == "eagle3")


@pytest.mark.parametrize("kind", KINDS)
def test_heads_that_learned_draft_what_the_base_says(tmp_path, make, kind):
    base = deep_base()
    inputs = prompts(3, vocab_size=len(WORDS))
    said = base.generate(**inputs, max_new_tokens=24, do_sample=False)
    row = Example(input_ids=said[0].tolist(), loss_mask=[0] * 3 + [1] * 24)
    heads = new_eagle_heads(base, kind=kind)
    data = ExampleDataset([row] * 4)
    trainer = make(kind, base=base, heads=heads, train_dataset=data, max_steps=25, **QUICK)
    trainer.train()
    trainer.save_model()
    spec = SpecModel.from_pretrained(base, tmp_path / "out")
    assert torch.equal(spec.generate(**inputs, max_new_tokens=24, do_sample=False), said)
    assert spec.last_speculation.tau > 1.5


@pytest.mark.parametrize("kind", KINDS)
def test_saved_heads_are_those_that_were_trained_with_their_vocabulary(tmp_path, make, kind):
    trainer = make(kind, max_steps=2)
    trainer.train()
    trainer.save_model()
    saved, trained = read_eagle(tmp_path / "out"), trainer.heads.state_dict()
    assert saved.config.kind == kind
    assert set(saved.tensors) == set(trained)
    assert all(torch.equal(saved.tensors[name], value) for name, value in trained.items())
    assert ("draft_columns" in trained) == (kind == "eagle3")
    assert "embed_tokens.weight" not in saved.tensors  # the base has them


def test_output_matrix_starts_as_the_rows_of_the_draft_vocabulary(rows):
    base = deep_base()
    heads = heads_of(base, rows, "eagle3")
    expected = base.get_output_embeddings().weight[heads.draft_columns]
    assert torch.equal(heads.lm_head.weight, expected)
    assert {parameter.dtype for parameter in heads.parameters()} == {torch.float32}
    whole = new_eagle_heads(base, kind="eagle3")
    assert whole.draft_columns is None
    assert torch.equal(whole.lm_head.weight, base.get_output_embeddings().weight)
    assert new_eagle_heads(base, kind="eagle").lm_head is None


def test_loaded_heads_go_on_with_their_own_vocabulary(tmp_path, make):
    base = deep_base()
    columns = torch.arange(4, 4 + DRAFT)  # not the most frequent ones
    first = make(base=base, heads=new_eagle_heads(base, kind="eagle3", columns=columns))
    first.save_model()
    heads = load_eagle_heads(base, tmp_path / "out")
    before = heads.fc.weight.clone()
    second = make(base=base, heads=heads, folder="second", max_steps=2)
    second.train()
    assert not torch.equal(heads.fc.weight, before)
    second.save_model()
    assert torch.equal(read_eagle(tmp_path / "second").tensors["draft_columns"], columns)


def test_heads_of_another_kind_cannot_be_loaded_to_go_on(tmp_path):
    base = deep_base()
    MedusaTrainingModel(base, new_medusa_heads(base)).write(tmp_path / "medusa")
    with pytest.raises(OptionError, match=r"those of a MedusaProposer, expected EAGLE heads"):
        load_eagle_heads(base, tmp_path / "medusa")


def test_resumed_training_draws_the_noise_that_an_unbroken_one_does(make):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = make("eagle", folder="whole", **settings)
    whole.train()
    make("eagle", folder="broken", callbacks=[StopAt(2)], **settings).train()
    resumed = make("eagle", folder="broken", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4
    for name, value in whole.heads.state_dict().items():
        torch.testing.assert_close(resumed.heads.state_dict()[name], value, atol=CLOSE, rtol=0)


def test_resumed_training_keeps_the_vocabulary_of_its_checkpoint(make):
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    begun = make(callbacks=[StopAt(1)], **settings)
    begun.train()
    base = deep_base()
    other = new_eagle_heads(base, kind="eagle3", columns=torch.arange(DRAFT))
    resumed = make(base=base, heads=other, **settings)
    resumed.train(resume_from_checkpoint=True)
    assert torch.equal(resumed.heads.draft_columns, begun.heads.draft_columns)
    assert not torch.equal(resumed.heads.draft_columns, torch.arange(DRAFT))


def test_evaluation_has_the_same_figures_without_noise(make, rows):
    trainer = make("eagle", max_steps=1, eval_dataset=rows)
    metrics = [trainer.evaluate() for _ in range(2)]
    assert {"eval_loss", "eval_step0_loss", "eval_step2_top3", "eval_estimated_tau"} <= set(
        metrics[0]
    )
    assert metrics[0]["eval_loss"] == metrics[1]["eval_loss"]


def test_rows_longer_than_the_heads_were_built_for_are_refused(make):
    base = deep_base()
    heads = EagleHeads(
        replace(EagleConfig.from_model_config(base.config, kind="eagle"), max_position_embeddings=9)
    )
    with pytest.raises(DataError, match="expected at most 9, the positions that base and heads"):
        make("eagle", base=base, heads=heads)


def test_base_with_too_few_layers_needs_feature_layers():
    base = deep_base(num_layers=6)
    with pytest.raises(OptionError, match="the base has 6 layers, expected at least 7"):
        new_eagle_heads(base, kind="eagle3")
    assert new_eagle_heads(base, kind="eagle3", feature_layers=(1, 3)).fc.in_features == 80


def test_heads_of_another_base_are_refused(make, rows):
    other = build_model("llama", num_hidden_layers=NUM_LAYERS)
    with pytest.raises(VocabularyMismatchError, match="EAGLE heads have a vocabulary of 160"):
        make(heads=new_eagle_heads(other, kind="eagle3"))
    narrow = deep_base(hidden_size=8, num_attention_heads=2, head_dim=4)
    with pytest.raises(OptionError, match="EAGLE heads read features of width 8"):
        make(heads=new_eagle_heads(narrow, kind="eagle3"))


def test_draft_vocabulary_is_no_larger_than_the_vocabulary(rows):
    counts = count_tokens(rows, vocab_size=len(WORDS))
    with pytest.raises(OptionError, match="draft_vocab_size is 31, expected 1 to 30"):
        choose_columns(counts, 31)
    heads = new_eagle_heads(deep_base(), kind="eagle", columns=choose_columns(counts, 4))
    assert (heads.config.draft_vocab_size, heads.lm_head) == (4, None)
