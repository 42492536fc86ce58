"""Filling a memory gives what the model's own logits say."""

import jaxtyping
import pytest
import torch

from speclm.demo import assets
from speclm.errors import OptionError, PromptError, VocabularyMismatchError
from speclm.methods.recycling import warm as module
from speclm.methods.recycling.memory import CandidateMemory
from speclm.methods.recycling.warm import WarmText, render_texts, warm_memory
from tests.models import VOCAB_SIZE, prompts, shared_model

TOLERANCE = 1e-2  # float16 of numbers up to 20


def text_of(length, *, is_answered=True, seed=0):
    return WarmText(prompts(length, seed=seed)["input_ids"][0].tolist(), is_answered)


def memory_of(**options):
    return CandidateMemory(vocab_size=VOCAB_SIZE, num_candidates=4, **options)


@pytest.mark.parametrize("family", ["llama", "bloom", "qwen3_next"])
def test_every_position_has_the_candidates_of_the_models_logits(family, monkeypatch):
    monkeypatch.setattr(module, "MAX_LOGITS", 5 * VOCAB_SIZE)  # several chunks
    model, text, memory = shared_model(family), text_of(12), memory_of()
    assert warm_memory(model, [text], memory) == 12
    with torch.no_grad():
        logits = model(torch.tensor([text.tokens])).logits[0]
    top = logits.log_softmax(-1).topk(4)
    pairs = list(zip([-1, *text.tokens], text.tokens, strict=False))
    for index, (previous, token) in enumerate(pairs[1:], 1):
        if (previous, token) in pairs[index + 1 :]:
            continue
        order, ids, log_probs = memory.find(previous, token)
        assert (order, ids) == (1, top.indices[index].tolist())
        assert log_probs == pytest.approx(top.values[index].tolist(), abs=TOLERANCE)


def test_prompts_are_answered_greedily_and_the_answer_is_read():
    model, memory, seen = shared_model("llama"), memory_of(), []
    text = text_of(6, is_answered=False)
    assert warm_memory(model, [text], memory, max_new_tokens=5, on_text=seen.append) == 11
    assert seen == [text]
    tokens = torch.tensor([text.tokens])
    answer = model.generate(tokens, do_sample=False, max_new_tokens=5)[0].tolist()
    for index in range(6, 10):
        assert memory.find(answer[index - 1], answer[index])[1][0] == answer[index + 1]


def test_answers_end_where_the_positions_do():
    model, memory = shared_model("llama"), memory_of()
    longest = model.config.max_position_embeddings
    texts = [text_of(longest - 2, is_answered=False), text_of(longest, is_answered=False)]
    assert warm_memory(model, texts, memory) == 2 * longest


def test_texts_that_cannot_be_read_are_named_before_any_is_read():
    model, memory, good = shared_model("llama"), memory_of(), text_of(4)
    with pytest.raises(PromptError, match=r"prompt 1 cannot be read: prompt has 600 tokens"):
        warm_memory(model, [good, text_of(600)], memory)
    with pytest.raises(VocabularyMismatchError, match="prompt 1 has token 160, expected less"):
        warm_memory(model, [good, WarmText([1, VOCAB_SIZE], is_answered=True)], memory)
    with pytest.raises(VocabularyMismatchError, match="the memory has a vocabulary of 9 tokens"):
        warm_memory(model, [good], CandidateMemory(vocab_size=9))
    with pytest.raises(OptionError, match="max_new_tokens is 0"):
        warm_memory(model, [good], memory, max_new_tokens=0)
    assert memory.num_tokens == 0


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(assets()["base"])


def test_chats_are_rendered_with_their_answer_or_a_prompt_for_one(tokenizer):
    question = {"role": "user", "content": "How many?"}
    answer = {"role": "assistant", "content": "Two."}
    asked, answered, text = render_texts([[question], [question, answer], "1 2"], tokenizer)
    assert [found.is_answered for found in (asked, answered, text)] == [False, True, False]
    assert answered.tokens[: len(asked.tokens)] == asked.tokens
    assert text.tokens == tokenizer("1 2")["input_ids"]


def test_chats_that_cannot_be_rendered_are_named(tokenizer, monkeypatch):
    with pytest.raises(PromptError, match="prompt 1 has no tokens"):
        render_texts(["1", ""], tokenizer)
    with pytest.raises(OptionError, match="prompt 0 is no Unicode text"):
        render_texts(["\ud800"], tokenizer)
    with pytest.raises(PromptError, match="the chat template refuses prompt 0"):
        render_texts([[{"no": "role"}]], tokenizer)
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as users run it
    bare = type("Bare", (), {"chat_template": None})()
    with pytest.raises(OptionError, match="prompt 0 is a conversation, and the tokenizer has no"):
        module._render([{"role": "user"}], bare, 0)
