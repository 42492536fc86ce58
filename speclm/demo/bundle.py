"""Find the bundled models and read the bundled prompts."""

from pathlib import Path

from speclm.errors import MissingAssetError, OptionError
from speclm.files.json_lines import read_json_lines
from speclm.files.questions import MT_BENCH_CATEGORIES, Question, parse_questions

DATA = Path(__file__).parent / "data"
NAMES = ("base", "block", "draft", "eagle", "eagle3", "medusa", "prompts", "questions")

QUESTION_SETS = ("spec-bench", "mt-bench")
"""Names of the bundled sets of questions."""

HUMANEVAL = "humaneval"
"""A set that is known, and not bundled."""


def assets() -> dict[str, Path]:
    """Return the folders of the bundled assets by name.

    ``base`` and ``draft`` are model folders with tokenizer; ``medusa``, ``eagle``, ``eagle3`` and
    ``block`` hold Medusa, EAGLE-1, EAGLE-3 and block heads for that base. Load the models with
    ``dtype=torch.float32``, because their files are bfloat16. ``prompts`` holds the conversations
    that [speclm.demo.load_prompts][] reads, and ``questions`` those of
    [speclm.demo.load_questions][].

    Raises:
        MissingAssetError: If an asset is not part of this installation.

    Example:
        >>> sorted(assets())
        ['base', 'block', 'draft', 'eagle', 'eagle3', 'medusa', 'prompts', 'questions']
    """
    paths = {name: DATA / name for name in NAMES}
    missing = [name for name, path in paths.items() if not path.is_dir()]
    if missing:
        raise MissingAssetError(
            f"{DATA}: expected the demo assets {list(NAMES)}, found no {missing}; install speclm "
            "from its wheel or from a full checkout"
        )
    return paths


def load_prompts(name: str, *, limit: int | None = None) -> list[list[dict[str, str]]]:
    """Read the conversations of one bundled set, each without its final assistant turn.

    Args:
        name: ``sql_dev`` or ``gsm8k_dev`` for reported figures; ``sql_tune`` or ``gsm8k_tune`` for
            choosing settings. The bundled draft model and heads were trained on neither.
            ``sql_case``, 450 prompts of which the first are ``sql_dev``, and ``sql_train``, 300
            prompts to train on, belong to ``examples/text_to_sql.py``.
        limit: Number of conversations to read from the start; None reads all.

    Returns:
        Messages with ``role`` and ``content``, as chat templates take them.

    Raises:
        OptionError: If no set has that name, or ``limit`` is negative.

    Example:
        >>> [message["role"] for message in load_prompts("sql_dev", limit=1)[0]]
        ['system', 'user']
    """
    files = {path.stem: path for path in assets()["prompts"].glob("*.jsonl")}
    if name not in files:
        raise OptionError(f"expected prompts named one of {sorted(files)}, found {name!r}")
    if limit is not None and limit < 0:
        raise OptionError(f"expected limit to be at least 0 or None, found {limit!r}")
    lines = read_json_lines(files[name])
    return [line.parse()["messages"][:-1] for line in lines[:limit]]


def load_questions(name: str) -> list[Question]:
    """Read a bundled set of questions.

    Args:
        name: ``spec-bench`` for the first questions of each category of Spec-Bench: two of each of
            the eight of MT-bench, and five of each other. ``mt-bench`` for those of MT-bench only.

    Raises:
        OptionError: If no set has that name.
        MissingAssetError: If the questions are not part of this installation.

    Example:
        >>> len(load_questions("spec-bench")), len(load_questions("mt-bench"))
        (41, 16)
    """
    if name not in QUESTION_SETS:
        raise OptionError(f"expected questions named one of {list(QUESTION_SETS)}, found {name!r}")
    lines = read_json_lines(assets()["questions"] / "spec_bench.jsonl")
    if name == "mt-bench":
        lines = [line for line in lines if line.parse()["category"] in MT_BENCH_CATEGORIES]
    return parse_questions(lines)
