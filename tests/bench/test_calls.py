import pytest
import torch
from tokenizers.processors import TemplateProcessing

from speclm.bench import make_calls, setting_options
from speclm.bench.decoders import render_prompt
from speclm.errors import OptionError, PromptError
from tests.byte_tokenizer import END, STRICT_TEMPLATE, byte_tokenizer


def test_batches_are_padded_on_the_left_and_seeded_one_after_the_other(calls_of):
    calls = calls_of(batch=2)
    assert [call.seed for call in calls] == [3, 4]
    assert all(call.attention_mask[:, -1].all() for call in calls)
    assert calls[0].attention_mask[1, 0] == 0


def test_last_batch_holds_what_is_left(tiny_base, tokenizer):
    calls = make_calls(["a", "b", "c"], tiny_base, tokenizer, options={}, batch=2)
    assert [len(call.input_ids) for call in calls] == [2, 1]


def test_conversations_go_through_the_chat_template(tokenizer):
    conversation = [{"role": "user", "content": "hello"}]
    text = render_prompt("prompt", conversation, tokenizer)
    assert "hello" in text
    assert text != "hello"
    assert render_prompt("prompt", "hello", tokenizer) == "hello"


def test_arguments_are_inputs_and_options(calls_of):
    (call, *_) = calls_of("t0.7")
    assert call.is_sampled
    assert set(call.arguments) == {"input_ids", "attention_mask", *call.options}
    assert torch.equal(call.arguments["input_ids"], call.input_ids)


def test_unknown_setting_names_the_known_ones():
    with pytest.raises(OptionError, match=r"t9.*greedy"):
        setting_options("t9")


def test_prompts_without_tokens_are_named(tiny_base, tokenizer):
    for batch in (1, 2):
        with pytest.raises(PromptError, match="prompt 2 has no tokens, expected at least one"):
            make_calls(["a", "b", "", "c"], tiny_base, tokenizer, options={}, batch=batch)


def test_texts_and_conversations_of_a_batch_get_their_own_special_tokens(tiny_base):
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|end|> $A", special_tokens=[("<|end|>", END)]
    )
    prompts = ["a", [{"role": "user", "content": "a"}]]
    alone = make_calls(prompts, tiny_base, tokenizer, options={})
    (call,) = make_calls(prompts, tiny_base, tokenizer, options={}, batch=2)
    for row, one in zip(call.input_ids, alone, strict=True):
        assert torch.equal(row[-one.input_ids.shape[1] :], one.input_ids[0])
    assert call.attention_mask.sum(dim=1).tolist() == [each.input_ids.shape[1] for each in alone]


def test_conversations_that_no_template_renders_are_named():
    chat = [{"role": "system", "content": "a"}]
    with pytest.raises(PromptError, match=r"refuses prompt 0 \(no system role\)"):
        render_prompt("prompt 0", chat, byte_tokenizer(STRICT_TEMPLATE))
    with pytest.raises(PromptError, match=r"refuses prompt 1 .*empty"):
        render_prompt("prompt 1", [], byte_tokenizer())
    with pytest.raises(OptionError, match=r"prompt 0 is a conversation, and .* no chat template"):
        render_prompt("prompt 0", chat, byte_tokenizer(None))


def test_text_that_cannot_be_encoded_is_named(tokenizer):
    with pytest.raises(OptionError, match="prompt 1 is no Unicode text"):
        render_prompt("prompt 1", "b\ud800", tokenizer)
