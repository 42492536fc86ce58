"""Questions of public benchmarks, and prompts of one's own, in the layouts of their files."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from speclm.errors import DataError
from speclm.files.json_lines import JsonLine

Message = dict[str, str]
Prompt = str | list[Message]

MT_BENCH_CATEGORIES = (
    "writing",
    "roleplay",
    "reasoning",
    "math",
    "coding",
    "extraction",
    "stem",
    "humanities",
)
"""Categories of MT-bench. Spec-Bench has them too, and reports them as one, `MT_BENCH_GROUP`."""
MT_BENCH_GROUP = "mt_bench"

_LAYOUTS = (
    'expected a question of Spec-Bench or MT-bench ("question_id", "category", "turns"), a problem '
    'of HumanEval ("task_id", "prompt", "entry_point"), "prompt", a string, or "messages", a list '
    'of objects with "role" and "content"'
)


@dataclass(frozen=True, slots=True)
class Question:
    """A question of one or several turns.

    Args:
        question_id: As in its file; of a row without one, the number of the row.
        category: As in its file; empty if there is none.
        group: Category of reports: `category`, or `MT_BENCH_GROUP`.
        turns: What each answer follows: messages that continue the conversation, or, as the only
            turn, a text.
        is_completion: Whether the text becomes a user's message if there is a chat template.
    """

    question_id: int | str
    category: str
    group: str
    turns: tuple[Prompt, ...]
    is_completion: bool = False

    @property
    def name(self) -> str:
        """What messages call it."""
        return f"question {self.question_id!r}"

    def first_prompt(self, *, has_template: bool) -> Prompt:
        """Return the prompt of the first turn.

        Args:
            has_template: Whether the tokenizer has a chat template.
        """
        first = self.turns[0]
        if self.is_completion and has_template and isinstance(first, str):
            return [_of_user(first)]
        return first


def parse_questions(lines: Sequence[JsonLine]) -> list[Question]:
    """Return the question in each line; the keys of a line say which layout it has.

    The layouts are those of Spec-Bench and MT-bench, of HumanEval, and rows with ``messages`` or
    ``prompt``, whose final assistant turn is dropped.

    Raises:
        DataError: If a line has another layout.
    """
    found = [_parse(line, number) for number, line in enumerate(lines, 1)]
    if any(question.group != MT_BENCH_GROUP for question in found):
        return found
    return [replace(question, group=question.category) for question in found]


def parse_prompt(line: JsonLine, *, keeps_answer: bool = False) -> Prompt:
    """Return the text or the messages in a line.

    Args:
        line: A row with ``prompt`` or ``messages``.
        keeps_answer: Whether a final assistant turn is kept.

    Raises:
        DataError: If it is anything else.
    """
    match line.parse():
        case {"messages": [*messages]} if all(map(_is_message, messages)):
            is_answered = bool(messages) and messages[-1]["role"] == "assistant"
            if asked := messages[:-1] if is_answered else messages:
                return messages if keeps_answer else asked
            raise DataError(
                f"{line.where}: no message that asks for an answer, found {line.excerpt}; drop the "
                "row or add one"
            )
        case {"prompt": str(text)} if text:
            return text
        case {"prompt": ""}:
            raise DataError(f"{line.where}: the prompt is empty; drop the row or fill it in")
    raise DataError(
        f'{line.where}: expected "prompt", a string, or "messages", a list of objects with "role" '
        f'and "content", found {line.excerpt}; correct the row'
    )


def _parse(line: JsonLine, number: int) -> Question:
    row = line.parse()
    match row:
        case {"question_id": int() | str(), "category": str(), "turns": [*turns]} if turns and all(
            isinstance(turn, str) and turn for turn in turns
        ):
            asked = tuple[Prompt, ...]([_of_user(turn)] for turn in turns)
            category = row["category"]
            group = MT_BENCH_GROUP if category in MT_BENCH_CATEGORIES else category
            return Question(row["question_id"], category, group, asked)
        case {"task_id": int() | str(), "prompt": str(text), "entry_point": str()} if text:
            category = "humaneval"
            return Question(row["task_id"], category, category, (text,), is_completion=True)
    if "turns" in row or not {"messages", "prompt"} & row.keys():
        raise DataError(f"{line.where}: {_LAYOUTS}; found {line.excerpt}; correct the row")
    category = row["category"] if isinstance(row.get("category"), str) else ""
    return Question(number, category, category, (parse_prompt(line),))


def _of_user(text: str) -> Message:
    return {"role": "user", "content": text}


def _is_message(value: Any) -> bool:
    match value:
        case {"role": str(), "content": str() | list()} | {"role": str(), "tool_calls": list()}:
            return True
    return False
