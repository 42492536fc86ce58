"""Streams: every call that a streamer gets is the one that regular generation makes."""

import asyncio
from functools import cache
from itertools import product
from threading import Thread
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TextIteratorStreamer, TextStreamer
from transformers.generation import StoppingCriteriaList
from transformers.generation.streamers import AsyncTextIteratorStreamer

from speclm import SpecModel
from tests.callbacks import EndsRowsByCalls, Tokens
from tests.grids import turns
from tests.models import prompts
from tests.outcomes import observe, require_same
from tests.proposers import build_proposer
from tests.settings import (
    EOS,
    GREEDY,
    NEW_TOKENS,
    SAMPLED,
    Inputs,
    force_text,
    tiny_draft,
    tiny_model,
    tokenizer,
)

LAYOUTS = {"one row": (6,), "padded rows": (7, 3, 5)}
MODES = {"greedy": GREEDY, "sampled": {**SAMPLED, "temperature": 0.9}}
KINDS = ("scripted", "random tree", "ngram", "none")
TEXTS = {
    "Chinese": "城市名称 北京 上海。\n人口很多",
    "emoji": "ok 🙂🙃 👩‍👩‍👧 🇩🇪 done",
    "words": "SELECT name FROM city\nWHERE id = 3 ;",
    "accents": "naïve café über Ærø",
}


def tiny_spec(kind: str, reference: list[list[int]], *, name: str = "ends") -> SpecModel:
    base = tiny_model(name)
    draft = tiny_draft(base.config.vocab_size)
    return SpecModel(base, build_proposer(kind, reference, target=base, draft=draft, seed=1))


def stream(model: Any, inputs: Inputs, *, name: str = "ends", **arguments: Any) -> Any:
    """Return the calls that a streamer gets, and the outcome of the call."""
    streamer = Tokens()
    outcome = observe(model, inputs, {"streamer": streamer, **arguments}, base=tiny_model(name))
    return streamer.calls, outcome


SEEDS = range(3)


@pytest.mark.parametrize(
    ("kind", "case"), turns(KINDS, tuple(product(SEEDS, MODES, reversed(LAYOUTS))))
)
def test_every_call_is_that_of_regular_generation(kind, case):
    seed, mode, layout = case
    inputs = prompts(*LAYOUTS[layout], vocab_size=60, seed=seed)
    arguments = {"max_new_tokens": NEW_TOKENS, **MODES[mode]}
    calls, expected = stream(tiny_model("ends"), inputs, **arguments)
    spec = tiny_spec(kind, expected.new_tokens(inputs))
    found_calls, found = stream(spec, inputs, **arguments)
    assert found_calls == calls
    require_same(found, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", MODES)
def test_stream_is_the_prompt_and_one_call_for_each_step_that_is_returned(mode, layout):
    inputs = prompts(*LAYOUTS[layout], vocab_size=60, seed=3)
    arguments = {"max_new_tokens": NEW_TOKENS, **MODES[mode]}
    expected = observe(tiny_model("ends"), inputs, arguments, base=tiny_model("ends"))
    spec = tiny_spec("scripted", expected.new_tokens(inputs))
    calls, found = stream(spec, inputs, **arguments)
    new_tokens = torch.tensor(found.new_tokens(inputs))
    batch = len(new_tokens)
    assert calls[0] == (
        "put",
        tuple(inputs["input_ids"].shape),
        inputs["input_ids"].tolist(),
        torch.int64,
        "cpu",
    )
    assert calls[1:-1] == [
        ("put", (batch,), column.tolist(), torch.int64, "cpu") for column in new_tokens.T
    ]
    assert calls[-1] == ("end",)


@pytest.mark.parametrize(
    ("stop", "mode"),
    turns(
        [
            {"eos_token_id": EOS},
            {"max_new_tokens": 1},
            {"max_new_tokens": 7},
            {"stopping_criteria": True},
        ],
        MODES,
    ),
    ids=str,
)
def test_nothing_is_streamed_after_a_stop_inside_an_accepted_run(mode, stop):
    inputs = prompts(6, vocab_size=60, seed=4)
    common = {"max_new_tokens": NEW_TOKENS, **MODES[mode]}
    endless = observe(tiny_model("endless"), inputs, common, base=tiny_model("endless"))

    def arguments() -> dict[str, Any]:
        own = (
            {"stopping_criteria": StoppingCriteriaList([EndsRowsByCalls(first=4)])}
            if "stopping_criteria" in stop
            else stop
        )
        return {**common, **own}

    calls, expected = stream(tiny_model("ends"), inputs, **arguments())
    spec = tiny_spec("scripted", endless.new_tokens(inputs))  # goes on after the stop
    found_calls, found = stream(spec, inputs, **arguments())
    assert found_calls == calls
    assert sum(call[0] == "put" for call in calls) == 1 + len(found.new_tokens(inputs)[0])
    require_same(found, expected)


def text_arguments(text: str, inputs: Inputs, mode: str) -> dict[str, Any]:
    length = len(tokenizer().encode(text))
    forced = force_text(text, inputs)
    return {**MODES[mode], "max_new_tokens": length, "prefix_allowed_tokens_fn": forced}


def text_prompt() -> dict[str, Tensor]:
    tokens = tokenizer()("List 城市 🙂 cities", return_tensors="pt")
    return {name: tokens[name] for name in ("input_ids", "attention_mask")}


@cache
def text_spec(text: str) -> SpecModel:
    return tiny_spec("scripted", [tokenizer().encode(text)], name="text")


TEXT_CELLS = turns(TEXTS, [True, False])


@pytest.mark.parametrize(("text", "case"), turns(TEXTS, tuple(product(MODES, [True, False]))))
def test_text_streamer_prints_what_it_prints_in_regular_generation(text, case, capsys):
    mode, skips_prompt = case
    inputs = text_prompt()
    spec = text_spec(TEXTS[text])
    printed = []
    for model in (spec.base, spec):
        streamer = TextStreamer(tokenizer(), skip_prompt=skips_prompt)
        torch.manual_seed(5)
        model.generate(**inputs, **text_arguments(TEXTS[text], inputs, mode), streamer=streamer)
        printed.append(capsys.readouterr().out)
    assert printed[1] == printed[0]
    assert printed[1].endswith(TEXTS[text] + "\n")
    assert ("List 城市" in printed[1]) == (not skips_prompt)


@pytest.mark.parametrize(("text", "skips_prompt"), TEXT_CELLS)
def test_iterator_in_a_thread_yields_the_pieces_of_regular_generation(text, skips_prompt):
    inputs = text_prompt()
    spec = text_spec(TEXTS[text])
    pieces = []
    for model in (spec.base, spec):
        streamer = TextIteratorStreamer(tokenizer(), skip_prompt=skips_prompt, timeout=60)
        arguments = {**inputs, **text_arguments(TEXTS[text], inputs, "greedy")}
        thread = Thread(target=model.generate, kwargs={**arguments, "streamer": streamer})
        thread.start()
        pieces.append(list(streamer))
        thread.join(timeout=60)
        assert not thread.is_alive()
    assert pieces[1] == pieces[0]
    assert "".join(pieces[1]).endswith(TEXTS[text])


def test_asynchronous_iterator_yields_the_pieces_of_regular_generation():
    text = TEXTS["emoji"]
    inputs = text_prompt()
    spec = text_spec(text)

    async def collect(model: Any) -> list[str]:
        streamer = AsyncTextIteratorStreamer(tokenizer(), skip_prompt=True, timeout=60)
        arguments = {**inputs, **text_arguments(text, inputs, "greedy"), "streamer": streamer}
        thread = Thread(target=model.generate, kwargs=arguments)
        thread.start()
        pieces = [piece async for piece in streamer]
        thread.join(timeout=60)
        return pieces

    found, expected = asyncio.run(collect(spec)), asyncio.run(collect(spec.base))
    assert found == expected
    assert "".join(found) == text


def test_text_streamer_refuses_a_batch_as_in_regular_generation():
    spec = tiny_spec("ngram", [[1]] * 2, name="text")
    for model in (spec.base, spec):
        with pytest.raises(ValueError, match="batch size 1"):
            model.generate(
                **prompts(4, 3, vocab_size=60), max_new_tokens=3, streamer=TextStreamer(tokenizer())
            )


STOPS = ("城市", "名", "上海", "很", "never")


@pytest.mark.parametrize(("stop", "kind"), turns(STOPS, KINDS[:3]))
def test_stop_string_ends_the_stream_with_the_token_that_completes_it(stop, kind):
    text = TEXTS["Chinese"]
    inputs = text_prompt()
    length = len(tokenizer().encode(text))

    def arguments() -> dict[str, Any]:
        return {
            **text_arguments(text, inputs, "sampled"),
            "stop_strings": [stop],
            "tokenizer": tokenizer(),
        }

    calls, expected = stream(tiny_model("text"), inputs, name="text", **arguments())
    spec = tiny_spec(kind, [tokenizer().encode(text)], name="text")
    found_calls, found = stream(spec, inputs, name="text", **arguments())
    assert found_calls == calls
    assert (len(found.new_tokens(inputs)[0]) == length) == (stop == "never")
    require_same(found, expected)
