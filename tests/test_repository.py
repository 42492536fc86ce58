"""Claims about the repository as a whole."""

import ast
import io
import re
import subprocess
import sys
import tokenize
import tomllib
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest

pytestmark = pytest.mark.untraced  # it reads the library and runs none of it

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "speclm"
MODULES = sorted(PACKAGE.rglob("*.py"))
MAX_LINES = 400
MAX_ASSET_BYTES = 35_000_000

# Files past MAX_LINES, each with the reason why splitting it would read worse.
LONG_FILES: dict[str, str] = {}

MAX_FILES = 300
MAX_FUNCTION_LINES, MAX_KERNEL_FUNCTION_LINES = 60, 120
MAX_LONG_FUNCTIONS = 5

# Kernel bodies past MAX_KERNEL_FUNCTION_LINES.
LONG_KERNELS = {"speclm/kernels/_triton_attention.py: split_kernel"}

# Words and the most that there may be of them: where it is not 0, it may only fall.
AVOIDED = (
    r"\blaws?\b",
    r"\bchances?\b",
    r"\bplain decoding\b|\bdecod\w+ plainly\b",
    r"\barms?\b",
    r"\blanes?\b",
    r"\bfrontiers?\b",
    r"\bwalk(s|ed|ing)?\b",
    r"\bin step\b",
    r"\bbeside\b",
    r"\bbehind\b",
    r"\bin front of\b",
    r"\bdear\b",
    r"\balone\b(?=[.,;:)]|$)",
    r"\bpaces?\b",
    r"\bguess(es)?\b",
)
MAX_SLOTS = 29  # outside cache/ and kernels/

# Put together here, so that this file does not contain them.
FORBIDDEN = (
    "../sha" + "red",
    "work/sha" + "red",
    ".libr" + "ary/",
    "py" + "pi.org",
    "pythonhos" + "ted",
)

# Functions whose tensors have the default dtype and device, and those with the default device.
MAKE_ANY_DTYPE = {"as_tensor", "empty", "eye", "full", "linspace", "ones", "rand", "randn"}
MAKE_ANY_DTYPE |= {"tensor", "zeros"}
MAKE_INTEGERS = {"arange", "randint", "randperm"}

# Imported by the first line of the library only if something went wrong.
HEAVY = ("triton", "typer", "rich")
LAZY = ("speclm.cli", "speclm.testing", "speclm.training", "speclm.bench", "speclm.demo")


def repository_files() -> list[Path]:
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [path for name in listing.split("\0") if (path := ROOT / name).is_file()]


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@dataclass
class Contents:
    """What these tests ask of a module.

    Args:
        allocations: Lines that make a tensor from nothing, and the keywords that are missing there.
        functions: Names of functions, and the number of their lines less one.
        imports: Modules and the names that are imported from them.
    """

    allocations: list[tuple[str, set[str]]] = field(default_factory=list)
    functions: list[tuple[str, int]] = field(default_factory=list)
    imports: list[tuple[str | None, str]] = field(default_factory=list)


@cache
def contents(module: Path) -> Contents:
    found = Contents()
    for node in ast.walk(ast.parse(module.read_bytes())):
        if isinstance(node, ast.Call):
            missing = missing_keywords(node)
            if missing is not None:
                found.allocations.append((f"{relative(module)}:{node.lineno}", missing))
        elif isinstance(node, ast.FunctionDef):
            found.functions.append((node.name, node.end_lineno - node.lineno))
        elif isinstance(node, ast.ImportFrom):
            found.imports += [(node.module, alias.name) for alias in node.names]
    return found


def missing_keywords(node: ast.Call) -> set[str] | None:
    """Return the keywords that a call lacks, None if it makes no tensor from nothing."""
    made = node.func
    if not (isinstance(made, ast.Attribute) and isinstance(made.value, ast.Name)):
        return None
    if made.value.id != "torch" or made.attr not in MAKE_ANY_DTYPE | MAKE_INTEGERS:
        return None
    needed = {"device"} | ({"dtype"} if made.attr in MAKE_ANY_DTYPE else set())
    return needed - {keyword.arg for keyword in node.keywords}


def is_public(module: Path) -> bool:
    return not any(part.startswith("_") for part in module.relative_to(PACKAGE).parts)


def test_layers_contract_is_exhaustive_over_the_package():
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    (contract,) = config["contracts"]
    assert config["root_package"] == "speclm"
    assert not config.get("exclude_type_checking_imports", False)
    assert contract["type"] == "layers"
    assert contract["containers"] == ["speclm"]
    assert contract["exhaustive"] is True
    assert contract["exhaustive_ignores"] == ["__main__", "_version"]
    assert "ignore_imports" not in contract


def test_public_modules_have_a_test_file_at_the_mirrored_path():
    missing = []
    for module in filter(is_public, MODULES):
        mirrored = ROOT / "tests" / module.relative_to(PACKAGE).with_name(f"test_{module.name}")
        if not mirrored.is_file():
            missing.append(relative(mirrored))
    assert missing == []


def test_no_file_names_what_lies_outside_the_repository():
    contents = {relative(path): path.read_bytes() for path in repository_files()}
    found = [
        (p, word) for p, text in contents.items() for word in FORBIDDEN if word.encode() in text
    ]
    assert not found


def test_tensors_made_from_nothing_have_a_stated_dtype_and_device():
    found = [place for module in MODULES for place in contents(module).allocations]
    assert len(found) > 100
    assert [place for place in found if place[1]] == []


def test_long_files_are_those_listed_with_a_reason():
    long_files = {relative(p) for p in MODULES if len(p.read_text().splitlines()) > MAX_LINES}
    assert long_files == set(LONG_FILES)
    assert all(LONG_FILES.values())


def test_package_has_few_files():
    assert len(MODULES) <= MAX_FILES


def test_few_functions_outside_kernels_are_long():
    long_functions = []
    for module in MODULES:
        is_kernel = relative(module).startswith("speclm/kernels/")
        limit = MAX_KERNEL_FUNCTION_LINES if is_kernel else MAX_FUNCTION_LINES
        long_functions += [
            f"{relative(module)}: {name}"
            for name, num_lines in contents(module).functions
            if num_lines >= limit
        ]
    in_kernels = {name for name in long_functions if name.startswith("speclm/kernels/")}
    assert in_kernels <= LONG_KERNELS
    assert len(long_functions) - len(in_kernels) <= MAX_LONG_FUNCTIONS, long_functions


def found_in_prose(words: re.Pattern[str], path: Path) -> list[str]:
    """Return words of a page, or of the docstrings and comments of a module."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py" and words.search(text):  # few are parsed, which takes long
        text = "\n".join(
            token.string
            for token in tokenize.generate_tokens(io.StringIO(text).readline)
            if token.type == tokenize.COMMENT
            or (token.type == tokenize.STRING and token.string.startswith(('"""', 'r"""')))
        )
    return [match[0] for match in words.finditer(text)]


def test_words_that_have_a_plainer_one_are_not_used():
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    words = re.compile("|".join(AVOIDED), re.IGNORECASE | re.MULTILINE)
    found = {relative(path): found_in_prose(words, path) for path in [*pages, *MODULES]}
    assert {path: words for path, words in found.items() if words} == {}


def test_slots_are_only_those_of_caches_and_kernels():
    parts = ("speclm/cache/", "speclm/kernels/")
    others = [module for module in MODULES if not relative(module).startswith(parts)]
    words = re.compile(r"\bslots?\b")
    assert sum(len(found_in_prose(words, module)) for module in others) <= MAX_SLOTS


def test_bundled_assets_fit_in_a_small_wheel():
    assets = [path for path in (PACKAGE / "demo" / "data").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in assets) < MAX_ASSET_BYTES


def test_import_needs_neither_triton_nor_the_command_line():
    # None in sys.modules makes an import fail as if the package were not installed.
    script = (
        "import sys\n"
        f"sys.modules.update(dict.fromkeys({HEAVY!r}))\n"
        "import speclm\n"
        f"print(*[name for name in {LAZY!r} if name in sys.modules])"
    )
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == []


def test_shape_annotations_are_not_postponed():
    postponed = []
    for module in MODULES:
        names = contents(module).imports
        is_shaped = any(imported == "jaxtyping" for imported, _ in names)
        if is_shaped and ("__future__", "annotations") in names:
            postponed.append(relative(module))
    assert postponed == []


def test_every_design_record_is_in_the_index():
    index = (ROOT / "docs" / "design" / "index.md").read_text()
    records = {path.name for path in (ROOT / "docs" / "design").glob("[0-9]*.md")}
    assert {name for name in records if f"({name})" not in index} == set()
