"""Claims about the repository as a whole."""

import ast
import re
import subprocess
import sys
import tokenize
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

pytestmark = pytest.mark.no_cover  # it reads the library and runs none of it

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "speclm"
MODULES = sorted(PACKAGE.rglob("*.py"))
MAX_LINES = 400
MAX_ASSET_BYTES = 35_000_000

# Files past MAX_LINES, each with the reason why splitting it would read worse.
LONG_FILES: dict[str, str] = {}

MAX_FILES = 243
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


@cache
def nodes(module: Path) -> list[ast.AST]:
    """Return all nodes of a module's syntax tree."""
    return list(ast.walk(ast.parse(module.read_bytes())))


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


def allocations(module: Path) -> Iterator[tuple[str, set[str]]]:
    """Yield where tensors are made from nothing, and the keywords that are missing there."""
    for node in nodes(module):
        made = node.func if isinstance(node, ast.Call) else None
        if not (isinstance(made, ast.Attribute) and ast.unparse(made.value) == "torch"):
            continue
        needed = {"device"} | ({"dtype"} if made.attr in MAKE_ANY_DTYPE else set())
        if made.attr in MAKE_ANY_DTYPE | MAKE_INTEGERS:
            missing = needed - {keyword.arg for keyword in node.keywords}
            yield f"{relative(module)}:{node.lineno}", missing


def test_tensors_made_from_nothing_have_a_stated_dtype_and_device():
    found = [place for module in MODULES for place in allocations(module)]
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
            f"{relative(module)}: {node.name}"
            for node in nodes(module)
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= limit
        ]
    in_kernels = {name for name in long_functions if name.startswith("speclm/kernels/")}
    assert in_kernels <= LONG_KERNELS
    assert len(long_functions) - len(in_kernels) <= MAX_LONG_FUNCTIONS, long_functions


@cache
def prose(path: Path) -> str:
    """Return a page, or the docstrings and comments of a module."""
    if path.suffix != ".py":
        return path.read_text(encoding="utf-8")
    with path.open("rb") as source:
        return "\n".join(
            token.string
            for token in tokenize.tokenize(source.readline)
            if token.type == tokenize.COMMENT
            or (token.type == tokenize.STRING and token.string.startswith(('"""', 'r"""')))
        )


def test_words_that_have_a_plainer_one_are_not_used():
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    found = [
        (relative(path), match[0])
        for path in [*pages, *MODULES]
        for words in AVOIDED
        for match in re.finditer(words, prose(path), re.IGNORECASE | re.MULTILINE)
    ]
    assert found == []


def test_slots_are_only_those_of_caches_and_kernels():
    parts = ("speclm/cache/", "speclm/kernels/")
    others = [module for module in MODULES if not relative(module).startswith(parts)]
    assert sum(len(re.findall(r"\bslots?\b", prose(module))) for module in others) <= MAX_SLOTS


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
        imports = [node for node in nodes(module) if isinstance(node, ast.ImportFrom)]
        names = {(node.module, alias.name) for node in imports for alias in node.names}
        is_shaped = any(node.module == "jaxtyping" for node in imports)
        if is_shaped and ("__future__", "annotations") in names:
            postponed.append(relative(module))
    assert postponed == []


def test_every_design_record_is_in_the_index():
    index = (ROOT / "docs" / "design" / "index.md").read_text()
    records = {path.name for path in (ROOT / "docs" / "design").glob("[0-9]*.md")}
    assert {name for name in records if f"({name})" not in index} == set()
