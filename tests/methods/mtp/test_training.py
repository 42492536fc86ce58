"""What MTP layers learn: the loss, what it reaches, and that decoding gains what was estimated."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from speclm import SpecModel
from speclm.errors import CheckpointError, OptionError, UnsupportedModelError
from speclm.methods.mtp.method import MtpRecipe
from speclm.methods.mtp.proposer import MtpProposer
from speclm.methods.mtp.rollout import roll_out
from speclm.methods.mtp.training import MtpObjective, MtpTrainingModel, load_mtp_heads
from speclm.training.arguments import training_arguments
from speclm.training.conversations import Example
from speclm.training.dataset import ExampleDataset, collate_examples
from speclm.training.heads_trainer import HeadsTrainer
from tests.methods.mtp.mtp_bases import QWEN, Row, make_base
from tests.models import build_model, prompts
from tests.training.runs import CLOSE, SETTINGS, StopAt, require_sum_of_parts

QUICK = {"learning_rate": 3e-3, "lr_scheduler_type": "constant", "warmup_steps": 0}
NUM_NEW, STEPS = 24, 3
CHAIN = {"width": 1, "branches": 1, "min_probability": 0.0, "min_confidence": 0.0}
NEAR = 0.01  # of tau; the rounds are the same, near ties aside
SMALL = MtpObjective(num_steps=2, num_measured=STEPS)


@pytest.fixture
def base(made):
    return AutoModelForCausalLM.from_pretrained(made.folder)


def said_by(base, *lengths):
    """Return what a base answers to some prompts, as examples."""
    inputs = prompts(*lengths)
    said = base.generate(**inputs, max_new_tokens=NUM_NEW, min_new_tokens=NUM_NEW, do_sample=False)
    masks = [mask.bool().tolist() + [True] * NUM_NEW for mask in inputs["attention_mask"]]
    rows = []
    for tokens, mask, length in zip(said.tolist(), masks, lengths, strict=True):
        kept = [token for token, is_kept in zip(tokens, mask, strict=True) if is_kept]
        rows.append(Example(input_ids=kept, loss_mask=[0] * length + [1] * NUM_NEW))
    return ExampleDataset(rows)


def make(base, folder, rows, *, objective=SMALL, heads=None, callbacks=(), **settings):
    arguments = training_arguments(folder, {**SETTINGS, **settings}, defaults=MtpRecipe.defaults)
    return HeadsTrainer(
        MtpTrainingModel(base, heads or load_mtp_heads(base), objective=objective),
        arguments,
        train_dataset=rows,
        eval_dataset=rows,
        callbacks=callbacks,
    )


def test_loss_is_the_weighted_cross_entropy_of_the_texts_own_tokens(base):
    model = MtpTrainingModel(base, load_mtp_heads(base), objective=MtpObjective(decay=0.6))
    tokens = prompts(13)["input_ids"]
    mask = torch.tensor([[0] * 4 + [1] * 5 + [0] * 2 + [1] * 2])
    found = model(tokens, torch.ones_like(tokens), mask.bool())
    with torch.no_grad():
        features = base(tokens, output_hidden_states=True).hidden_states[-1]
        outputs = roll_out(
            model.heads,
            features,
            tokens,
            torch.arange(12)[None],
            num_steps=3,
            embedding=base.get_input_embeddings(),
        )
        expected = 0.0
        for step, output in enumerate(outputs):
            logs = base.lm_head(output[0]).log_softmax(-1)
            counted = [t for t in range(11 - step) if mask[0, t + 2 + step]]
            losses = [-logs[t, tokens[0, t + 2 + step]] for t in counted]
            assert found["counts"][step] == len(losses)
            torch.testing.assert_close(found["loss_sums"][step], sum(losses))
            expected += 0.6**step * sum(losses) / len(losses)
    torch.testing.assert_close(found["loss"].detach(), expected)


def test_gradients_reach_all_of_the_trained_layers_and_nothing_else(tmp_path):
    three = make_base(tmp_path, "glm4_moe").folder
    base = AutoModelForCausalLM.from_pretrained(three)
    heads = load_mtp_heads(base)
    model = MtpTrainingModel(base, heads, objective=SMALL)
    tokens = prompts(12, 9)["input_ids"]
    model(tokens, torch.ones_like(tokens), torch.ones_like(tokens).bool())["loss"].backward()
    assert all(parameter.grad is None for parameter in base.parameters())
    untouched = {name for name, value in heads.named_parameters() if value.grad is None}
    of_last = {name for name, _ in heads.named_parameters() if name.startswith("layers.2.")}
    assert untouched == of_last | {f"layers.{i}.decoder.embed_tokens.weight" for i in (0, 1)}
    assert {parameter.dtype for parameter in heads.parameters()} == {torch.float32}


def test_losses_of_accumulated_batches_add_up(base):
    model = MtpTrainingModel(base, load_mtp_heads(base), objective=SMALL)
    rows = [
        {"input_ids": prompts(9)["input_ids"][0].tolist(), "loss_mask": [0, 0, *[1] * 7]},
        {"input_ids": prompts(6)["input_ids"][0].tolist(), "loss_mask": [0, 0, 0, 1, 1, 0]},
    ]
    require_sum_of_parts(model, rows)


@pytest.mark.parametrize("repeats", [False, True])
def test_tuned_layers_gain_what_was_estimated_and_the_tokens_stay(made, repeats, tmp_path):
    row = Row("qwen2", {}, QWEN, {}) if repeats else None
    folder = made.folder if row is None else make_base(tmp_path / "base", row).folder
    base = AutoModelForCausalLM.from_pretrained(folder)
    rows = said_by(base, 5, 3)
    trainer = make(base, tmp_path / "out", rows, max_steps=30, **QUICK)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < 0.5 * before["eval_loss"]
    trainer.save_model()
    options = {**CHAIN, "depth": STEPS, "num_draft_tokens": STEPS}
    spec = SpecModel.from_pretrained(base, tmp_path / "out", heads_kwargs=options, adaptive=False)
    inputs = prompts(5, 3)
    limit = {"max_new_tokens": NUM_NEW, "min_new_tokens": NUM_NEW, "do_sample": False}
    assert torch.equal(spec.generate(**inputs, **limit), base.generate(**inputs, **limit))
    assert spec.last_speculation.tau == pytest.approx(after["eval_estimated_tau"], rel=NEAR)
    assert after["eval_estimated_tau"] > max(1.5, before["eval_estimated_tau"])


def test_resumed_training_ends_as_an_unbroken_one_and_goes_on_from_what_was_written(base, tmp_path):
    rows = said_by(base, 4, 3)
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, **QUICK}
    whole = make(base, tmp_path / "whole", rows, **settings)
    whole.train()
    make(base, tmp_path / "broken", rows, callbacks=[StopAt(2)], **settings).train()
    resumed = make(base, tmp_path / "broken", rows, **settings)
    resumed.train(resume_from_checkpoint=True)
    resumed.save_model()
    again = load_mtp_heads(base, tmp_path / "broken")
    for name, value in whole.heads.state_dict().items():
        torch.testing.assert_close(resumed.heads.state_dict()[name], value, atol=CLOSE, rtol=0)
        assert torch.equal(again.state_dict()[name], resumed.heads.state_dict()[name])


def test_what_cannot_be_trained_is_named(base, made, tmp_path):
    with pytest.raises(OptionError, match=r"names no files.*heads_path"):
        load_mtp_heads(build_model("llama"))
    plain = build_model("llama")
    plain.save_pretrained(tmp_path / "llama")
    with pytest.raises(CheckpointError, match="the base comes without MTP layers"):
        load_mtp_heads(AutoModelForCausalLM.from_pretrained(tmp_path / "llama"))
    with pytest.raises(OptionError, match=r"'draft_model', expected a folder or hub id of MTP"):
        load_mtp_heads(base, made.folder)
    with pytest.raises(OptionError, match="num_steps is 0"):
        MtpObjective(num_steps=0)


def test_layers_that_share_tensors_are_not_trained(tmp_path):
    row = Row("qwen2", {}, QWEN, {}, num_steps=2)
    base = AutoModelForCausalLM.from_pretrained(make_base(tmp_path, row).folder)
    with pytest.raises(UnsupportedModelError, match=r"2 MTP layers share \['mtp.fc.weight'"):
        load_mtp_heads(base)


def test_cached_states_give_the_same_loss(base):
    model = MtpTrainingModel(base, load_mtp_heads(base), objective=SMALL)
    batch = collate_examples([Example(input_ids=[5, 9, 3, 7, 1, 8], loss_mask=[0, 0, 1, 1, 1, 1])])
    expected = model(**batch)["loss"]
    states = model.run_base(batch["input_ids"], batch["attention_mask"], model.layers_read)
    with model.given_states(states):
        assert torch.equal(model(**batch)["loss"], expected)


def test_weights_of_another_precision_are_trained_in_float32(made):
    base = AutoModelForCausalLM.from_pretrained(made.folder, dtype=torch.bfloat16)
    model = MtpTrainingModel(base, load_mtp_heads(base), objective=SMALL)
    batch = collate_examples([Example(input_ids=[5, 9, 3, 7, 1], loss_mask=[0, 0, 1, 1, 1])])
    model(**batch)["loss"].backward()
    assert model.heads.layer(0).projection.weight.grad.dtype == torch.float32
    assert MtpProposer(model.heads, target=base).heads is model.heads
