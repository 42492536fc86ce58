"""The tau that training estimates, against the one that decoding measures."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from speclm import SpecModel
from speclm.demo.bundle import assets, load_prompts
from speclm.methods.eagle.method import EagleRecipe
from speclm.methods.eagle.objective import EagleObjective, EagleTrainingModel
from speclm.methods.eagle.proposer import EagleProposer
from speclm.methods.eagle.training import (
    new_eagle_heads,
)
from speclm.training.arguments import training_arguments
from speclm.training.conversations import Example
from speclm.training.dataset import ExampleDataset, choose_columns, count_tokens
from speclm.training.heads_trainer import HeadsTrainer
from tests.training.runs import SETTINGS

NUM_ROWS, NUM_HELD_OUT = 8, 4
STEPS = 3
NEAR = 0.01  # of tau; the rounds are the same, near ties aside
LIMIT = {"max_new_tokens": 24, "do_sample": False}
CHAIN = {"width": 1, "branches": 1, "min_probability": 0.0, "min_confidence": 0.0}


@pytest.fixture(scope="module")
def base():
    return AutoModelForCausalLM.from_pretrained(assets()["base"], dtype=torch.float32)


@pytest.fixture(scope="module")
def inputs():
    tokenizer = AutoTokenizer.from_pretrained(assets()["base"], padding_side="left")
    rows = load_prompts("sql_tune", limit=NUM_ROWS)
    return tokenizer.apply_chat_template(
        rows, add_generation_prompt=True, return_tensors="pt", return_dict=True, padding=True
    )


@pytest.fixture(scope="module")
def answered(base, inputs):
    """Return the prompts with what the base answered, up to the end of each answer."""
    length = inputs["input_ids"].shape[1]
    rows = []
    for said, mask in zip(base.generate(**inputs, **LIMIT), inputs["attention_mask"], strict=True):
        prompt, answer = said[:length][mask.bool()].tolist(), said[length:].tolist()
        if base.config.eos_token_id in answer:
            answer = answer[: answer.index(base.config.eos_token_id) + 1]
        written = [0] * len(prompt) + [1] * len(answer)
        rows.append(Example(input_ids=prompt + answer, loss_mask=written))
    return rows


@pytest.mark.parametrize("kind", ["eagle", "eagle3"])
def test_estimated_tau_is_that_of_decoding_with_a_chain(base, inputs, answered, kind, tmp_path):
    train, held_out = (
        ExampleDataset(part) for part in (answered[NUM_HELD_OUT:], answered[:NUM_HELD_OUT])
    )
    columns = None
    if kind == "eagle3":
        columns = choose_columns(count_tokens(train, vocab_size=base.config.vocab_size), 512)
    settings = {**SETTINGS, "max_steps": 12, "learning_rate": 4e-3, "warmup_steps": 2}
    heads = new_eagle_heads(base, kind=kind, columns=columns)
    objective = EagleObjective(num_steps=STEPS, num_measured=STEPS)
    trainer = HeadsTrainer(
        EagleTrainingModel(base, heads, objective=objective),
        training_arguments(tmp_path, settings, defaults=EagleRecipe.defaults),
        train_dataset=train,
        eval_dataset=held_out,
    )
    trainer.train()
    estimated = trainer.evaluate()["eval_estimated_tau"]
    proposer = EagleProposer(
        trainer.heads.eval(), target=base, depth=STEPS, num_draft_tokens=STEPS, **CHAIN
    )
    spec = SpecModel(base, proposer, adaptive=False)
    held_out_inputs = {name: value[:NUM_HELD_OUT] for name, value in inputs.items()}
    spec.generate(**held_out_inputs, **LIMIT)
    assert estimated > 1.2
    assert spec.last_speculation.tau == pytest.approx(estimated, rel=NEAR)
