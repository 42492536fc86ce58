"""Every fenced block of the documentation runs, or is marked as output; nothing can be skipped.

The blocks of a page run in order in one process, in an empty folder: ``python`` blocks share one
namespace; in ``bash`` and ``console`` blocks (where commands follow ``$``) each line is a known
command. ``speclm`` lines run, ``make`` targets, scripts and their options must exist, and what
fetches or installs is checked for form. In ``sh`` blocks, whose files are the reader's, options of
``speclm`` are checked and nothing runs. ``text`` is output.
"""

import re
import shlex
import subprocess
import tomllib
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import typer
from markdown_it import MarkdownIt
from transformers.cli.serve import Serve
from typer._click.exceptions import NoSuchOption
from typer.core import TyperGroup

from speclm.cli import app
from tests.docs.fresh_process import Processes, Step

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]

REQUIREMENT = re.compile(r"(?:speclm|\.)(?:\[(?P<extras>[a-z,]+)\])?(?:[=<>~!]=?[\w.,<>=]+)?")
URL = re.compile(r"https://[\w./-]+")
# Of a training; pages show what longer ones print.
FEW_STEPS = ("--training-arg", "max_steps=2")
SHELL_SYNTAX = {"|", "||", "&", "&&", ";", ">", ">>", "<", "(", ")"}


def commands(source: str, line: int, *, prompted: bool) -> list[tuple[int, list[str]]]:
    """Split a shell block into (line, words), joining lines that end in a backslash."""
    found, pending, start = [], "", line
    for number, text in enumerate(source.splitlines(), line):
        if not pending:
            start = number
            if prompted and not text.startswith("$ "):
                continue  # output
        pending += text if pending or not prompted else text.removeprefix("$ ")
        if pending.endswith("\\"):
            pending = pending.removesuffix("\\") + " "
            continue
        lexer = shlex.shlex(pending, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        if words := list(lexer):
            found.append((start, words))
        pending = ""
    assert not pending, f"line {start + 1}: the command does not end"
    return found


def check_form(words: list[str]) -> None:
    """Check a command that is not run: that it exists, and is written as it would be used."""
    match words:
        case ["speclm", *arguments]:
            check_options(arguments)
        case ["torchrun" | "accelerate", *rest] if "-m" in rest:
            _, module, *arguments = rest[rest.index("-m") :]
            assert module == "speclm", f"not speclm: {module}"
            check_options(arguments)
        case ["transformers", "serve", *arguments]:
            options = {word.partition("=")[0] for word in arguments if word.startswith("--")}
            known = {f"--{name.replace('_', '-')}" for name in signature(Serve).parameters}
            assert options <= known, f"transformers serve has no {options - known}"
        case ["make", target]:
            subprocess.run(["make", "-n", target], cwd=ROOT, check=True, capture_output=True)
        case ["git", "clone", url] | ["git", "clone", url, _]:
            assert URL.fullmatch(url), f"not a repository: {url}"
        case ["cd", _]:
            pass
        case ["python", script, *options] if (ROOT / script).is_file():
            source = (ROOT / script).read_text(encoding="utf-8")
            for option in options:
                known = not option.startswith("--") or f'"{option}"' in source
                assert known, f"{script} has no option {option}"
        case ["pip", "install", *requirements]:
            wanted = [word for word in requirements if word not in ("-e", "-U", "--upgrade")]
            assert wanted, "pip install installs nothing"
            for requirement in wanted:
                form = REQUIREMENT.fullmatch(requirement)
                assert form, f"not speclm: {requirement}"
                extras = set((form["extras"] or "").split(",")) - {""}
                assert extras <= set(EXTRAS), f"no such extra: {requirement}"
        case _:
            pytest.fail(f"not a command that documentation may show: {shlex.join(words)}")


def check_options(arguments: list[str]) -> None:
    """Check that speclm has a command and its options, without running it."""
    command: Any = typer.main.get_command(app)
    name, rest, context = "speclm", arguments, None
    while True:
        context = command.make_context(name, list(rest), parent=context)
        if not isinstance(context.command, TyperGroup):
            return
        words = [*context._protected_args, *context.args]
        name, command, rest = context.command.resolve_command(context, words)


def steps(page: Path) -> list[Step]:
    """Read what has to run from a page, and check the form of what does not."""
    found: list[Step] = []
    for token in MarkdownIt().parse(page.read_text(encoding="utf-8")):
        if token.type == "code_block":
            pytest.fail(f"{page.name}:{token.map[0] + 1}: indented code; use a fence")
        if token.type != "fence":
            continue
        language, line = token.info.split(" ")[0], token.map[0] + 1
        if language == "python":
            found.append((page.name, line, token.content))
        elif language == "sh":
            for _, words in commands(token.content, line, prompted=False):
                check_form(words)
        elif language in ("bash", "console"):
            for start, words in commands(token.content, line, prompted=language == "console"):
                where = f"{page.name}:{start + 1}"
                assert not SHELL_SYNTAX.intersection(words), f"{where}: one plain command a line"
                if words[0] == "speclm":
                    is_long = words[1:2] == ["train"] and FEW_STEPS[1] not in words
                    found.append((page.name, start, [*words, *FEW_STEPS] if is_long else words))
                else:
                    check_form(words)
        else:
            assert language == "text", f"{page.name}:{line}: unknown language {language!r}"
    return found


def run_page(processes: Processes, page: Path, folder: Path) -> None:
    """Run the blocks of a page in a folder; fail with what the first broken one printed."""
    if todo := steps(page):
        failure = processes.run(todo, folder)
        assert failure is None, failure


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_page_runs(page, processes, tmp_path):
    run_page(processes, page, tmp_path)


def fenced(language: str, source: str) -> str:
    return f"```{language}\n{source}\n```\n"


@pytest.fixture
def run(processes, tmp_path):
    def run_text(*blocks: str) -> None:
        page = tmp_path / "page.md"
        page.write_text("\n".join(blocks))
        run_page(processes, page, tmp_path)

    return run_text


def test_python_blocks_share_a_namespace_in_order(run, tmp_path):
    run(
        fenced("python", "x = 1"), "Then:\n", fenced("python", "open('out', 'w').write(str(x + 1))")
    )
    assert (tmp_path / "out").read_text() == "2"


def test_python_error_names_the_line_of_the_page(run):
    with pytest.raises(AssertionError, match=r'page\.md", line 6'):
        run(fenced("python", "x = 1"), fenced("python", "y"))


def test_indented_fence_is_run_too(run):
    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        run("- item\n\n    ```python\n    1 / 0\n    ```\n")


def test_known_commands_pass(run):
    run(
        fenced("bash", 'make demo  # once\npip install -e ".[dev]"\npip install "speclm[kernels]"'),
        fenced("console", "$ git clone https://example.org/speclm.git\n$ cd speclm\nany output"),
        fenced("bash", "python benchmarks/decode/decode.py --set sql --n 3"),
        fenced("text", "tau 3.1"),
    )


FAILURES = (
    AssertionError,
    pytest.fail.Exception,
    subprocess.CalledProcessError,
    NoSuchOption,
)
REFUSED = (
    ("", "x"),
    ("json", "{}"),
    ("bash", "rm -rf ."),
    ("bash", "make demo && make test"),
    ("bash", "make no-such-target"),
    ("sh", "speclm bench --prompts a.jsonl --no-such-option"),
    ("sh", "speclm train medusa --no-such-option"),
    ("sh", "torchrun --nproc-per-node 2 -m speclm train medusa --no-such-option"),
    ("sh", "torchrun -m other"),
    ("bash", "pip install something-else"),
    ("bash", "pip install 'speclm[nosuch]'"),
    ("bash", "make \\"),
    ("bash", "python no_such_script.py"),
    ("bash", "python benchmarks/decode/decode.py --no-such-option"),
    ("console", "$ curl example.org"),
)


def test_anything_else_fails(run):
    for language, source in REFUSED:
        with pytest.raises(FAILURES):
            run(fenced(language, source))


def test_failing_speclm_command_is_reported_with_its_line(run):
    with pytest.raises(AssertionError, match=r"page\.md:2: speclm no-such-command failed"):
        run(fenced("bash", "speclm no-such-command"))
