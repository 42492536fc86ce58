"""Logits of a forced text are those that the model's own `generate` sees."""

import torch

from speclm.self_check.regular import regular_logits
from speclm.target import TargetView
from tests.models import build_model, prompts, shared_model

INPUTS = prompts(5, 3)


def logits_of(model, text):
    with torch.no_grad():
        return regular_logits(
            TargetView(model), INPUTS["input_ids"], INPUTS["attention_mask"], text
        )


def test_logits_are_those_of_generate():
    model = shared_model("llama")
    settings = {"do_sample": False, "max_new_tokens": 4}
    output = model.generate(**INPUTS, **settings, return_dict_in_generate=True, output_logits=True)
    found = logits_of(model, output.sequences[:, 5:8])
    assert torch.equal(found, torch.stack(output.logits, dim=1))


def test_generation_config_of_the_model_is_neither_read_nor_changed():
    model, text = build_model("llama"), torch.tensor([[7, 8], [9, 10]])
    expected = logits_of(model, text)
    model.generation_config.update(
        num_beams=3, do_sample=True, stop_strings=["x"], eos_token_id=7, repetition_penalty=2.0
    )
    before = model.generation_config.to_dict()
    state = torch.get_rng_state()
    assert torch.equal(logits_of(model, text), expected)
    assert model.generation_config.to_dict() == before
    assert torch.equal(torch.get_rng_state(), state)
