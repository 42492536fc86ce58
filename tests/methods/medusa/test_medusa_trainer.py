import logging

import pytest
import torch

from speclm import SpecModel
from speclm.errors import NumericalError, OptionError, VocabularyMismatchError
from speclm.methods.medusa.checkpoint import read_medusa
from speclm.methods.medusa.network import MedusaHeads, MedusaHeadsConfig
from speclm.methods.medusa.training import MedusaObjective, MedusaTrainer, new_medusa_heads
from speclm.training.arguments import training_arguments
from speclm.training.assistant_tokens import TokenizedRow
from speclm.training.rows import TrainingRows, load_rows
from tests.models import prompts, shared_model
from tests.training.runs import CLOSE, SETTINGS, StopAt
from tests.training.talks import TAGGED, WORDS, tiny_base, word_tokenizer, write_alphabet


@pytest.fixture
def rows(tmp_path):
    return load_rows(write_alphabet(tmp_path / "rows.jsonl"), word_tokenizer(TAGGED))


@pytest.fixture
def make(tmp_path, rows):
    def make_trainer(*, folder="out", num_heads=2, eval_dataset=None, callbacks=(), **settings):
        base = tiny_base()
        return MedusaTrainer(
            base,
            new_medusa_heads(base, num_heads=num_heads),
            training_arguments(tmp_path / folder, {**SETTINGS, **settings}),
            train_dataset=rows,
            eval_dataset=eval_dataset,
            callbacks=callbacks,
        )

    return make_trainer


def test_heads_learn_a_small_data_set(make):
    trainer = make(max_steps=60, learning_rate=0.02, lr_scheduler_type="constant", warmup_steps=0)
    trainer.train()
    first, last = trainer.state.log_history[0], trainer.state.log_history[-2]
    assert last["loss"] < first["loss"] / 4
    assert last["head0_top1"] > 0.9
    assert last["estimated_tau"] > 2.2  # the best is 2.5: ten tokens in rounds of 3, 3, 3 and 1


def test_heads_that_learned_draft_what_the_base_says(tmp_path, make):
    trainer = make(max_steps=40, learning_rate=0.02, lr_scheduler_type="constant", warmup_steps=0)
    base = trainer.model.view.model
    inputs = prompts(3, vocab_size=len(WORDS))
    said = base.generate(**inputs, max_new_tokens=24, do_sample=False)
    mask = [0] * 3 + [1] * 24
    trainer.train_dataset = TrainingRows([TokenizedRow(said[0].tolist(), mask)] * 4)
    trainer.train()
    trainer.save_model()
    spec = SpecModel.from_pretrained(base, tmp_path / "out")
    assert torch.equal(spec.generate(**inputs, max_new_tokens=24, do_sample=False), said)
    assert spec.last_speculation.tau > 2


@pytest.mark.parametrize("has_own_lm_head", [False, True])
def test_saved_heads_are_those_that_were_trained(tmp_path, rows, has_own_lm_head):
    base = tiny_base()
    trainer = MedusaTrainer(
        base,
        new_medusa_heads(base, num_heads=2, has_own_lm_head=has_own_lm_head),
        training_arguments(tmp_path / "out", {**SETTINGS, "max_steps": 2}),
        train_dataset=rows,
    )
    trainer.train()
    trainer.save_model()
    trained, saved = trainer.heads.state_dict(), read_medusa(tmp_path / "out")
    assert trained["weight"].any()
    assert set(saved.tensors) == set(trained)
    assert all(torch.equal(saved.tensors[name], value) for name, value in trained.items())
    assert saved.vocab_size == len(WORDS)
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_every_log_has_the_figures_of_each_head(make):
    trainer = make(max_steps=2)
    trainer.train()
    for log in trainer.state.log_history[:2]:
        for head in (0, 1):
            assert {f"head{head}_{name}" for name in ("loss", "top1", "top2", "top3")} <= set(log)
        assert 1.0 <= log["estimated_tau"] <= 3.0


def test_evaluation_has_the_same_figures(make, rows):
    trainer = make(max_steps=1, eval_dataset=rows)
    metrics = trainer.evaluate()
    assert {"eval_loss", "eval_head1_top3", "eval_estimated_tau"} <= set(metrics)
    assert trainer.state.log_history[-1]["eval_estimated_tau"] == metrics["eval_estimated_tau"]
    trainer.train()
    assert "estimated_tau" in trainer.state.log_history[0]


def test_best_checkpoint_can_be_chosen_by_estimated_tau(make, rows):
    trainer = make(
        max_steps=2,
        eval_dataset=rows,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="estimated_tau",
        greater_is_better=True,
    )
    trainer.train()
    assert trainer.state.best_metric >= 1.0


@pytest.mark.parametrize("strategy", ["group_by_length", "random"])
def test_resumed_training_ends_where_an_unbroken_one_does(make, strategy):
    # Three batches an epoch: both halves cross into another epoch.
    settings = {
        "max_steps": 8,
        "save_strategy": "steps",
        "save_steps": 4,
        "train_sampling_strategy": strategy,
    }
    whole = make(folder="whole", **settings)
    whole.train()
    make(folder="broken", callbacks=[StopAt(4)], **settings).train()
    resumed = make(folder="broken", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 8
    for name, value in whole.heads.state_dict().items():
        torch.testing.assert_close(resumed.heads.state_dict()[name], value, atol=CLOSE, rtol=0)
    assert whole.state.log_history[7]["loss"] == pytest.approx(
        resumed.state.log_history[7]["loss"], abs=CLOSE
    )


def test_resume_passes_over_a_checkpoint_that_was_cut_off(make, tmp_path, caplog):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    make(callbacks=[StopAt(2)], **settings).train()
    (tmp_path / "out" / "checkpoint-3").mkdir()
    trainer = make(**settings)
    with caplog.at_level(logging.WARNING, "speclm"):
        trainer.train(resume_from_checkpoint=True)
    assert "resuming from" in caplog.text
    assert "checkpoint-2" in caplog.text
    assert trainer.state.global_step == 4


def test_resume_without_checkpoint_starts_anew_and_says_so(make, caplog):
    trainer = make(max_steps=1)
    with caplog.at_level(logging.WARNING, "speclm"):
        trainer.train(resume_from_checkpoint=True)
    assert "no complete checkpoint was found" in caplog.text
    assert trainer.state.global_step == 1


def test_progress_bar_shows_loss_and_estimated_tau(make, capsys):
    make(max_steps=2, disable_tqdm=False).train()
    shown = capsys.readouterr()
    assert "estimated tau" in shown.err
    assert "head0_top1" not in shown.out


def test_loss_that_is_no_number_is_an_error_with_a_remedy(make):
    trainer = make(max_steps=1)
    with torch.no_grad():
        trainer.heads.weight.fill_(float("nan"))
    with pytest.raises(NumericalError, match=r"loss of step 1 is nan.*lower the learning rate"):
        trainer.train()


def test_soft_targets_train_too(tmp_path, rows):
    base = tiny_base()
    trainer = MedusaTrainer(
        base,
        new_medusa_heads(base, num_heads=2, num_layers=2, has_own_lm_head=True),
        training_arguments(tmp_path / "out", {**SETTINGS, "max_steps": 10}),
        train_dataset=rows,
        objective=MedusaObjective(soft_weight=0.5),
    )
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history[:10]]
    assert losses[-1] < losses[0]


def test_rows_of_any_dataset_are_grouped_by_length(make, rows):
    trainer = make(max_steps=1)
    sampler = trainer._get_train_sampler([rows[i] for i in range(len(rows))])
    assert list(sampler) == list(trainer._get_train_sampler())


def test_heads_of_another_base_are_refused(tmp_path, rows):
    arguments = training_arguments(tmp_path / "out", SETTINGS)
    with pytest.raises(VocabularyMismatchError, match="heads are for a vocabulary of 160"):
        MedusaTrainer(
            tiny_base(),
            new_medusa_heads(shared_model("llama")),
            arguments,
            train_dataset=rows,
        )
    narrow = MedusaHeads(MedusaHeadsConfig(hidden_size=8, vocab_size=len(WORDS)))
    with pytest.raises(OptionError, match="heads are 8 wide"):
        MedusaTrainer(tiny_base(), narrow, arguments, train_dataset=rows)
