"""Answers in the layout of Spec-Bench, whose own scripts compare them."""

import json
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from speclm.bench.decoders import Outcome
from speclm.bench.dialogues import decode
from speclm.bench.pairs import Comparison, Pair
from speclm.errors import OptionError, reason_of
from speclm.files.atomic import write_file, written_together


def write_answers(
    folder: Path,
    comparisons: Sequence[tuple[str, Comparison]],
    tokenizer: PreTrainedTokenizerBase,
) -> list[Path]:
    """Write a file of answers for regular generation and for every method with counters.

    A file holds a line for each question, as ``evaluation/eval.py`` of Spec-Bench writes it, and is
    named after the method and the setting, such as ``speclm-greedy.jsonl``.

    Args:
        folder: Created if it does not exist. Files of the same names are replaced.
        comparisons: Pairs of the name of a setting and a measurement on questions.
        tokenizer: Decodes the answers.

    Returns:
        The files.

    Raises:
        OptionError: If there is no answer to a question, or the files cannot be written.
    """
    contents: dict[str, list[dict[str, Any]]] = {}
    for setting, comparison in comparisons:
        for method, is_plain in (("plain", True), (comparison.method, False)):
            name = f"{method}-{setting}"
            rows = answer_rows(comparison, tokenizer, model_id=name, is_plain=is_plain)
            if rows and name not in contents:
                contents[name] = rows
    if not contents:
        raise OptionError(
            "there is no answer to write; measure questions with batches of 1, and into a new file "
            "of --out"
        )
    files = [f"{name}.jsonl" for name in contents]
    try:
        with written_together(folder, last=files[-1]) as aside:
            for file, rows in zip(files, contents.values(), strict=True):
                lines = [json.dumps(row, ensure_ascii=False) for row in rows]
                write_file(aside / file, "\n".join(lines) + "\n")
    except OSError as error:
        raise OptionError(
            f"the answers cannot be written to {str(folder)!r} ({reason_of(error)}); name a folder "
            "that you may write to"
        ) from error
    return [folder / file for file in files]


def answer_rows(
    comparison: Comparison, tokenizer: PreTrainedTokenizerBase, *, model_id: str, is_plain: bool
) -> list[dict[str, Any]]:
    """Return the answers to each question; none of a method without counters.

    ``accept_lengths`` has the tokens of each target forward after the prefill, bonus token
    included, so that their mean is tau; ``decoding_steps`` counts these forwards. The forward that
    reads the prompt is in ``wall_time`` only. Regular generation has a token in each forward.

    Args:
        comparison: The measurement.
        tokenizer: Decodes the answers.
        model_id: Name of model and method.
        is_plain: Whether the answers of regular generation are returned, not those of the method.

    Source: https://github.com/hemingkx/Spec-Bench, evaluation/eval.py.
    """
    turns: dict[int, list[Pair]] = {}
    for pair in comparison.pairs:
        if pair.question is not None:
            turns.setdefault(id(pair.question), []).append(pair)
    rows = []
    for pairs in turns.values():
        outcomes = [pair.plain if is_plain else pair.method for pair in pairs]
        question = pairs[0].question
        assert question is not None, "only turns of questions are collected"
        lengths = [_accept_lengths(outcome, is_plain=is_plain) for outcome in outcomes]
        known = [found for found in lengths if found is not None]
        if len(known) < len(lengths):
            return []
        choice = {
            "index": 0,
            "turns": [decode(outcome.tokens[0], tokenizer).strip() for outcome in outcomes],
            "decoding_steps": [len(found) for found in known],
            "new_tokens": [outcome.num_tokens for outcome in outcomes],
            "wall_time": [outcome.seconds for outcome in outcomes],
            "accept_lengths": [length for found in known for length in found],
        }
        rows.append(
            {
                "question_id": question.question_id,
                "category": question.category,
                "answer_id": uuid.uuid4().hex,
                "model_id": model_id,
                "choices": [choice],
                "tstamp": time.time(),
            }
        )
    return rows


def _accept_lengths(outcome: Outcome, *, is_plain: bool) -> list[int] | None:
    """Return the tokens of each target forward after the prefill; None if they are not known."""
    if is_plain:
        return [1] * (outcome.num_tokens - 1)
    if outcome.stats is None:
        return None
    return [1 + length for length in outcome.stats.total.accepted_lengths]
