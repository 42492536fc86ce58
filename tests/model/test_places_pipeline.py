"""A text generation pipeline around a `SpecModel`, or a patched base, says what it says always."""

import contextlib
import logging

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer, pipeline
from transformers.utils import logging as hf_logging

import speclm
from speclm import SpecModel
from speclm.demo.bundle import assets

TEXTS = ["how many wins in table_2", "SELECT name FROM", "a"]
CHATS = [
    [{"role": "user", "content": "how many players are there?"}],
    [{"role": "user", "content": "name them"}],
]
GREEDY = {"max_new_tokens": 10, "do_sample": False}
SAMPLED = {"max_new_tokens": 8, "do_sample": True, "num_return_sequences": 3}


@pytest.fixture(scope="module")
def base():
    return AutoModelForCausalLM.from_pretrained(assets()["base"], dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(assets()["base"])


@pytest.fixture
def library_log(caplog):
    """Everything that Transformers and speclm log."""
    hf_logging.enable_propagation()
    with caplog.at_level(logging.WARNING):
        yield caplog
    hf_logging.disable_propagation()


def run(model, tokenizer, inputs, settings):
    torch.manual_seed(3)
    return pipeline("text-generation", model=model, tokenizer=tokenizer)(inputs, **settings)


@pytest.mark.parametrize(
    ("place", "inputs", "settings"),
    [
        ("model", TEXTS, {**GREEDY, "batch_size": 3}),
        ("model", TEXTS[0], SAMPLED),
        ("model", CHATS[0], GREEDY),
        ("model", CHATS, {**GREEDY, "batch_size": 2, "return_full_text": False}),
        ("patch", TEXTS[1], {**GREEDY, "return_full_text": False}),
        ("patch", CHATS, {**SAMPLED, "batch_size": 2}),
    ],
)
def test_text_is_that_of_the_base_and_nothing_more_is_logged(
    base, tokenizer, library_log, place, inputs, settings
):
    expected = run(base, tokenizer, inputs, settings)
    of_the_base = set(library_log.messages)
    library_log.clear()
    spec = SpecModel.from_pretrained(base, "ngram")
    with spec if place == "patch" else contextlib.nullcontext():
        found = run(base if place == "patch" else spec, tokenizer, inputs, settings)
    assert found == expected
    assert set(library_log.messages) <= of_the_base
    assert spec.last_speculation.fallbacks == []


def test_pipeline_streams_the_same_text(base, tokenizer, capsys):
    printed = []
    for model in (base, SpecModel.from_pretrained(base, "ngram")):
        streamer = TextStreamer(tokenizer, skip_prompt=True)
        run(model, tokenizer, TEXTS[0], {**GREEDY, "streamer": streamer})
        printed.append(capsys.readouterr().out)
    assert printed[0].strip()
    assert printed[0] == printed[1]


def test_pipeline_names_the_bases_class_and_moves_the_model(base, tokenizer):
    spec = speclm.SpecModel.from_pretrained(base, "ngram")
    pipe = pipeline("text-generation", model=spec, tokenizer=tokenizer, device="cpu")
    assert type(base).__name__ in repr(pipe)
    assert pipe.model is spec
