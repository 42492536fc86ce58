import json

import pytest

from speclm.errors import DataError
from speclm.files.json_lines import split_json_lines
from speclm.files.questions import Question, parse_questions

WRITING = {"question_id": 81, "category": "writing", "turns": ["Compose.", "Rewrite it."]}
RAG = {"question_id": 481, "category": "rag", "turns": ["Read this."], "reference": ["x"]}
HUMANEVAL = {
    "task_id": "HumanEval/0",
    "prompt": "def f():\n",
    "entry_point": "f",
    "canonical_solution": "    pass\n",
    "test": "check",
}


def parse(*rows):
    lines = b"\n".join(json.dumps(row).encode() for row in rows)
    return parse_questions(split_json_lines(lines, name="q.jsonl"))


def of_user(text):
    return [{"role": "user", "content": text}]


def test_layouts_are_recognised_by_their_keys():
    conversation = [*of_user("a"), {"role": "assistant", "content": "b"}]
    found = parse(RAG, HUMANEVAL, {"prompt": "text"}, {"messages": conversation, "category": "own"})
    assert found == [
        Question(481, "rag", "rag", (of_user("Read this."),)),
        Question("HumanEval/0", "humaneval", "humaneval", ("def f():\n",), is_completion=True),
        Question(3, "", "", ("text",)),
        Question(4, "own", "own", (of_user("a"),)),
    ]


def test_categories_of_mt_bench_are_one_group_among_others_as_in_spec_bench():
    assert [question.group for question in parse(WRITING, RAG)] == ["mt_bench", "rag"]
    (question,) = parse(WRITING)
    assert question.group == "writing"
    assert question.turns == (of_user("Compose."), of_user("Rewrite it."))


def test_categories_of_own_prompts_stay_as_they_are():
    own = {"prompt": "2 + 2", "category": "math"}
    assert [question.group for question in parse(own, RAG)] == ["math", "rag"]


def test_problem_of_humaneval_is_asked_as_a_message_if_there_is_a_chat_template():
    problem, text = parse(HUMANEVAL, {"prompt": "text"})
    assert problem.first_prompt(has_template=True) == of_user("def f():\n")
    assert problem.first_prompt(has_template=False) == "def f():\n"
    assert text.first_prompt(has_template=True) == "text"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "?"}, r"q\.jsonl:1: expected a question of Spec-Bench or MT-bench .*found"),
        ({**RAG, "turns": []}, "expected a question of Spec-Bench"),
        ({**RAG, "turns": ["a", ""]}, "expected a question of Spec-Bench"),
        ({**RAG, "category": None}, "expected a question of Spec-Bench"),
        ({**HUMANEVAL, "prompt": ""}, "the prompt is empty"),
        ({"messages": []}, "no message that asks"),
        ({"messages": [{"role": "user"}]}, 'objects with "role" and "content", found'),
        ({"messages": [{"role": "user", "content": None}]}, 'objects with "role" and "content"'),
    ],
)
def test_row_of_another_layout_is_named(row, message):
    with pytest.raises(DataError, match=message):
        parse(row)
