from dataclasses import replace

import pytest
import torch

from speclm.bench import (
    compare,
    make_dialogues,
    plain_decoder,
    prompt_lookup_decoder,
    speculative_decoder,
)
from speclm.bench.dialogues import num_positions, without_room
from speclm.cache import CACHE_NAME
from speclm.errors import PromptError
from speclm.files.questions import Question
from speclm.methods.ngram.proposer import NgramProposer

OPTIONS = {"do_sample": False, "max_new_tokens": 12}


def question(*turns, question_id=81, group="writing"):
    asked = tuple([{"role": "user", "content": turn}] for turn in turns)
    return Question(question_id, group, group, asked)


@pytest.fixture
def dialogue_of(tiny_base, tokenizer):
    def make(*turns, **options):
        arguments = {**OPTIONS, **options}
        (made,) = make_dialogues([question(*turns)], tiny_base, tokenizer, options=arguments)
        return made

    return make


@pytest.fixture
def logging_decoder(tiny_base):
    """A decoder that logs the lengths of the caches that it was given."""

    def make(decoder, log):
        def generate(call):
            cache = call.options.get(CACHE_NAME)
            log.append(None if cache is None else cache.get_seq_length())
            return decoder.generate(call)

        return replace(decoder, generate=generate)

    return make


@pytest.mark.parametrize("sampling", [{}, {"do_sample": True, "temperature": 1.0, "top_k": 0}])
def test_turns_go_on_with_the_cache_and_give_the_tokens_of_whole_prompts(
    tiny_base, dialogue_of, logging_decoder, sampling
):
    dialogue = dialogue_of("one two three", "four one two", "x", **sampling)
    plain = plain_decoder(tiny_base)
    ours = speculative_decoder("ngram", tiny_base, NgramProposer())
    answers = {}
    for decoder in (plain, ours):
        log = []
        answers[decoder.name] = found = dialogue.answered_by(logging_decoder(decoder, log))
        assert log[0] is None
        lengths = [answer.call.input_ids.shape[1] for answer in found]
        assert [a < b for a, b in zip(lengths[:-1], log[1:], strict=True)] == [True, True]
        assert [answer.turn for answer in found] == [0, 1, 2]
    for one, two in zip(answers["plain"], answers["ngram"], strict=True):
        assert torch.equal(one.call.input_ids, two.call.input_ids)
        assert one.outcome.tokens == two.outcome.tokens == plain.run(one.call).tokens


def test_method_that_cannot_keep_a_cache_reads_the_whole_conversation(
    tiny_base, dialogue_of, logging_decoder
):
    log = []
    dialogue_of("one two", "three").answered_by(
        logging_decoder(prompt_lookup_decoder(tiny_base), log)
    )
    assert log == [None, None]


def test_question_ends_where_the_model_has_no_positions_left(tiny_base, dialogue_of):
    assert num_positions(tiny_base) == 256
    plain = plain_decoder(tiny_base)
    (answer,) = dialogue_of("a " * 100, "b " * 200).answered_by(plain)
    length = answer.call.input_ids.shape[1]
    (cut,) = dialogue_of("a " * 100, max_new_tokens=1000).answered_by(plain)
    assert cut.call.options["max_new_tokens"] == 256 - length


def test_questions_without_room_are_found_and_named(tiny_base, tokenizer):
    questions = [question("a"), question("a " * 300, question_id=9)]
    found = without_room(questions, tiny_base, tokenizer)
    assert list(found) == [1]
    assert found[1] > 256
    empty = Question(7, "", "", ("",))
    with pytest.raises(PromptError, match="question 7 has no tokens"):
        without_room([empty], tiny_base, tokenizer)


def test_turns_after_a_difference_are_left_out_if_identity_is_promised(tiny_base, dialogue_of):
    plain = plain_decoder(tiny_base)

    def generate(call):
        output = plain.generate(call)
        sequences = output["sequences"] if not isinstance(output, torch.Tensor) else output
        sequences[0, call.input_ids.shape[1]] += 1
        return output

    for promises, turns in ((True, [0]), (False, [0, 1])):
        wrong = replace(plain, name="wrong", generate=generate, promises_identity=promises)
        tasks = [dialogue_of("one", "two")]
        (comparison,) = compare(plain, [wrong], tasks, base=tiny_base, num_warmup=0)
        assert [pair.turn for pair in comparison.pairs] == turns
        assert comparison.num_identical == 0
        assert comparison.is_honest is not promises


def test_comparison_is_divided_by_group(tiny_base, tokenizer):
    questions = [question("a"), question("b", group="rag"), question("c")]
    plain = plain_decoder(tiny_base)
    tasks = make_dialogues(questions, tiny_base, tokenizer, options=OPTIONS)
    (comparison,) = compare(plain, [plain], tasks, base=tiny_base, num_warmup=0)
    parts = comparison.by_group()
    assert {name: len(part.pairs) for name, part in parts.items()} == {"writing": 2, "rag": 1}
    assert parts["rag"].pairs == [comparison.pairs[1]]
    assert parts["writing"].by_group() == {}
