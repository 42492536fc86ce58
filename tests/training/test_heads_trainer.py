"""The trainer of all heads: what it logs, refuses and resumes from."""

import logging
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import Dataset, IterableDataset

from speclm.errors import CheckpointError, DataError, NumericalError, OptionError
from speclm.methods.medusa.training import MedusaTrainingModel, new_medusa_heads
from speclm.training.arguments import training_arguments
from speclm.training.conversations import Example
from speclm.training.dataset import ExampleDataset, load_examples
from speclm.training.heads_trainer import HeadsTrainer
from tests.models import build_model
from tests.training.alphabet import TAGGED, WORDS, word_tokenizer, write_alphabet
from tests.training.runs import SETTINGS, StopAt

GOOD = Example(input_ids=[5, 6, 7, 8], loss_mask=[0, 0, 1, 1])
SILENT = Example(input_ids=[5, 6, 7, 8], loss_mask=[1, 1, 0, 0])  # nothing is drafted so early
LONG = Example(input_ids=[5] * 17, loss_mask=[1] * 17)
NEAR = 1e-5  # float32 sums in another order
EVERY_STEP = {"save_strategy": "steps", "save_steps": 1}


class Made(Dataset):
    """Examples that are made when they are asked for."""

    def __init__(self, *masks):
        self.masks = masks

    def __len__(self):
        return len(self.masks)

    def __getitem__(self, index):
        return Example(input_ids=[5] * len(self.masks[index]), loss_mask=self.masks[index])


class Stream(IterableDataset):
    """Examples without a length."""

    def __iter__(self):
        while True:
            yield GOOD


@pytest.fixture
def alphabet(tmp_path):
    return load_examples(write_alphabet(tmp_path / "rows.jsonl"), word_tokenizer(TAGGED))


@pytest.fixture
def make(tmp_path):
    def make_trainer(
        dataset=None, *, eval_dataset=None, num_heads=2, folder="out", callbacks=(), **settings
    ):
        base = build_model("llama", vocab_size=len(WORDS), max_position_embeddings=16)
        heads = new_medusa_heads(base, num_heads=num_heads)
        return HeadsTrainer(
            MedusaTrainingModel(base, heads),
            training_arguments(tmp_path / folder, {**SETTINGS, "max_steps": 1, **settings}),
            train_dataset=dataset or ExampleDataset([GOOD] * 4),
            eval_dataset=eval_dataset,
            callbacks=callbacks,
        )

    return make_trainer


def own_texts(base):
    """Return examples that a base wrote."""
    prompt = torch.tensor([[5, 6, 7]])
    (said,) = base.generate(prompt, max_new_tokens=9, do_sample=False, pad_token_id=0).tolist()
    return ExampleDataset([Example(input_ids=said, loss_mask=[0] * 3 + [1] * (len(said) - 3))] * 4)


def test_accumulated_batches_train_as_one_large_batch(make):
    lengths = (3, 12, 4, 9)  # texts of 1 to 10 targets
    rows = [
        Example(input_ids=list(range(length)), loss_mask=[0, 0] + [1] * (length - 2))
        for length in lengths
    ]
    settings = {"optim": "sgd", "learning_rate": 1.0, "warmup_steps": 0}
    settings["train_sampling_strategy"] = "random"
    large = make(ExampleDataset(rows), **settings)
    large.train()
    parts = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    small = make(ExampleDataset(rows), **settings, **parts)
    small.train()
    assert large.heads.weight.abs().max() > 0.01
    for name, value in large.heads.state_dict().items():
        torch.testing.assert_close(small.heads.state_dict()[name], value, atol=NEAR, rtol=0)
    losses = [trainer.state.log_history[0]["loss"] for trainer in (large, small)]
    assert losses[0] == pytest.approx(losses[1], abs=NEAR)


def test_parameters_may_have_learning_rates_of_their_own(make):
    trainer = make(learning_rate=0.5)
    trainer.training_model.rate_factors = {"heads.bias": 4.0}
    groups = trainer.create_optimizer().param_groups
    names = {p: name for name, p in trainer.model.named_parameters()}
    rates = {names[p]: group["lr"] for group in groups for p in group["params"]}
    assert rates == {"heads.weight": 0.5, "heads.bias": 2.0}
    assert trainer.create_optimizer().param_groups == groups  # it is made once


def test_checkpointing_of_a_frozen_base_is_refused(make):
    for name in ("activation_checkpointing_enable", "gradient_checkpointing_enable"):
        with pytest.raises(OptionError, match="gradient_checkpointing is true, expected false"):
            getattr(make().training_model, name)()


def test_every_log_has_the_figures_of_each_draft_token(make, alphabet):
    trainer = make(alphabet, max_steps=2)
    trainer.train()
    for log in trainer.state.log_history[:2]:
        for head in (0, 1):
            assert {f"head{head}_{name}" for name in ("loss", "top1", "top2", "top3")} <= set(log)
        assert 1.0 <= log["estimated_tau"] <= 3.0


def test_summary_has_the_figures_of_steps_that_no_log_had(make, alphabet):
    trainer = make(alphabet, max_steps=3, logging_steps=2)
    trainer.train()
    assert [("head0_top1" in log) for log in trainer.state.log_history] == [True, True]
    assert "train_loss" in trainer.state.log_history[-1]
    trainer = make(alphabet, max_steps=1)
    trainer.train()
    assert "head0_top1" not in trainer.state.log_history[-1]  # the log before it has them


def test_evaluation_has_the_same_figures_and_a_meter_of_its_own(make, alphabet):
    trainer = make(alphabet, eval_dataset=alphabet)
    with torch.no_grad():
        trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader())))
    metrics = trainer.evaluate()
    assert {"eval_loss", "eval_head1_top3", "eval_estimated_tau"} <= set(metrics)
    assert trainer.state.log_history[-1]["eval_estimated_tau"] == metrics["eval_estimated_tau"]
    assert "head0_top1" in trainer._drain(is_training=True)


def test_best_checkpoint_can_be_chosen_by_estimated_tau(make, alphabet):
    trainer = make(
        alphabet,
        eval_dataset=alphabet,
        max_steps=3,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="estimated_tau",
        greater_is_better=True,
        **EVERY_STEP,
    )
    trainer.train()
    assert trainer.state.best_metric >= 1.0
    best = load_file(Path(trainer.state.best_model_checkpoint, "model.safetensors"))
    assert torch.equal(trainer.heads.weight, best["heads.weight"])


def test_one_progress_bar_shows_loss_estimated_tau_and_evaluation(make, alphabet, capsys):
    settings = {"disable_tqdm": False, "eval_strategy": "steps", "eval_steps": 2, "max_steps": 2}
    trainer = make(alphabet, eval_dataset=alphabet, **settings)
    trainer.train()
    shown = capsys.readouterr()
    assert "estimated tau" in shown.err
    assert "2/2" in shown.err
    assert "evaluating 3/3" in shown.err
    assert "head0_top1" not in shown.out
    trainer.evaluate()
    assert "3/3" in capsys.readouterr().err  # outside of a training it has a bar of its own


def test_loss_that_is_no_number_is_an_error_with_a_remedy(make):
    trainer = make()
    with torch.no_grad():
        trainer.heads.weight.fill_(float("nan"))
    with pytest.raises(NumericalError, match=r"loss of step 1 is nan.*lower the learning rate"):
        trainer.train()


def test_examples_that_cannot_be_trained_on_are_named(make):
    for bad, words in (
        (SILENT, "example 1: the loss mask of 4 tokens is all zero after the second.*drop the"),
        (LONG, r"example 1 has 17 tokens, expected at most 16.*cut examples with max_length=16"),
    ):
        dataset = ExampleDataset([GOOD, bad])
        with pytest.raises(DataError, match=words):
            make(dataset)
        with pytest.raises(DataError, match=words):
            make(eval_dataset=dataset)
        with pytest.raises(DataError, match=words):
            make(eval_dataset={"first": ExampleDataset([GOOD]), "second": dataset})


def test_examples_are_checked_in_any_dataset_with_a_length(make):
    with pytest.raises(DataError, match="no examples to train on"):
        make(eval_dataset=Made())
    with pytest.raises(DataError, match="example 0: the loss mask of 3 tokens"):
        make(Made([0, 0, 0]))


def test_stream_of_examples_is_trained_on(make):
    trainer = make(Stream(), train_sampling_strategy="random")
    trainer.train()
    assert trainer.state.global_step == 1


def test_examples_of_any_dataset_are_grouped_by_length(make, alphabet):
    trainer = make(alphabet)
    sampler = trainer._get_train_sampler([alphabet[i] for i in range(len(alphabet))])
    assert list(sampler) == list(trainer._get_train_sampler())


@contextmanager
def hearing_transformers(caplog):
    """Let a fixture hear what Transformers logs, which does not propagate."""
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        yield
    finally:
        logger.removeHandler(caplog.handler)


@pytest.mark.parametrize("strategy", ["group_by_length", "random"])
def test_resumed_training_is_the_unbroken_one_bit_for_bit(make, alphabet, caplog, strategy):
    # Two steps an epoch, the second of one batch: step 3 ends within an epoch.
    settings = {
        "max_steps": 7,
        "save_strategy": "steps",
        "save_steps": 0.4,  # three steps
        "gradient_accumulation_steps": 2,
        "train_sampling_strategy": strategy,
    }
    whole = make(alphabet, folder="whole", **settings)
    whole.train()
    make(alphabet, folder="broken", callbacks=[StopAt(3)], **settings).train()
    resumed = make(alphabet, folder="broken", **settings)
    with hearing_transformers(caplog):
        resumed.train(resume_from_checkpoint=True)
    assert "do not match" not in caplog.text
    assert (resumed.state.global_step, resumed.args.save_steps) == (7, 0.4)
    resumed = make(alphabet, folder="broken", **settings)
    resumed.train(resume_from_checkpoint=True)  # finished: no step is added
    assert resumed.state.global_step == 7
    for name, value in whole.heads.state_dict().items():
        assert torch.equal(resumed.heads.state_dict()[name], value)
    for expected, log in zip(whole.state.log_history, resumed.state.log_history, strict=True):
        for name in ("loss", "learning_rate", "estimated_tau", "grad_norm"):
            assert log.get(name) == expected.get(name)
    rates = [log["learning_rate"] for log in whole.state.log_history[:7]]
    assert len({*rates}) > 5  # a schedule that a wrong step would leave


def test_training_with_other_data_or_options_is_not_resumed(make, alphabet):
    settings = {"max_steps": 2, **EVERY_STEP}
    make(alphabet, callbacks=[StopAt(1)], **settings).train()
    fewer = ExampleDataset([alphabet[index] for index in range(8)])
    with pytest.raises(
        CheckpointError, match=r"the data was 12 examples .* and is 8 with .*; resu"
    ):
        make(fewer, **settings).train(resume_from_checkpoint=True)
    changed = {**settings, "learning_rate": 0.5, "seed": 3}
    words = r"learning_rate was 0\.001 and is 0\.5; seed was 42 and is 3; resume with what it began"
    with pytest.raises(CheckpointError, match=words):
        make(alphabet, **changed).train(resume_from_checkpoint=True)
    other = make(alphabet, **settings)
    other.options = {"decay": 0.5}
    with pytest.raises(CheckpointError, match=r"decay was None and is 0\.5"):
        other.train(resume_from_checkpoint=True)
    with torch.no_grad():
        other.model.view.model.lm_head.weight.mul_(2)
    other.options = {}
    with pytest.raises(CheckpointError, match="the base has other weights"):
        other.train(resume_from_checkpoint=True)


def test_training_says_what_it_trains_before_the_first_step(make, alphabet, caplog):
    trainer = make(alphabet, max_steps=1)
    with caplog.at_level(logging.INFO, "speclm"):
        trainer.train()
    lines = caplog.messages
    assert lines[0].startswith("trained: 3,280 parameters; frozen: ")
    assert lines[1] == "data: 12 examples, 132 tokens that count; 1 optimizer steps"
    assert lines[2].startswith("memory: 0.2 MB (weights 0.1 MB, gradients ")
    assert "expected 70% or more" in lines[3]
    assert "speclm data distill" in lines[3]
    said = []
    trainer.announce = said.append
    trainer.train_dataset = own_texts(trainer.model.view.model)
    trainer.train()
    assert said[-1] == "the base itself would write 100% of the answers' tokens (4 examples)"


def test_resume_without_checkpoint_starts_anew_and_says_so(make, caplog):
    trainer = make()
    with caplog.at_level(logging.WARNING, "speclm"):
        trainer.train(resume_from_checkpoint=True)
    assert "no complete checkpoint was found" in caplog.text
    assert trainer.state.global_step == 1


def test_damaged_and_foreign_checkpoints_are_refused(make, tmp_path):
    settings = {"max_steps": 2, **EVERY_STEP}
    trainer = make(callbacks=[StopAt(1)], **settings)
    trainer.train()
    with pytest.raises(CheckpointError, match=r"other heads.*size mismatch.*options.*began with"):
        make(num_heads=3, **settings).train(resume_from_checkpoint=True)
    (folder,) = map(str, tmp_path.rglob("checkpoint-1"))
    for name, load in (
        ("model.safetensors", trainer._load_from_checkpoint),
        ("optimizer.pt", trainer._load_optimizer_and_scheduler),
        ("rng_state.pth", trainer._load_rng_state),
    ):
        path = Path(folder, name)
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(CheckpointError, match=r"checkpoint-1: the checkpoint cannot be read"):
            load(folder)
    for missing in ("nowhere", folder):
        Path(folder, "trainer_state.json").write_text("[" * 10**5)
        with pytest.raises(CheckpointError, match=rf"{missing}: the checkpoint cannot be read"):
            trainer.train(resume_from_checkpoint=missing)
