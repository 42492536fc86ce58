"""What every test runs under: shape checks, one thread, no network, hypothesis profiles.

This file is imported before any test module, hence before ``speclm``: the shape checks are put in
while a module is imported, and cannot be added to one that already is.
"""

import atexit
import gc
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import nullcontext
from dataclasses import is_dataclass
from functools import wraps
from inspect import isclass, isfunction
from typing import Any, Self

os.environ["HF_HUB_OFFLINE"] = "1"  # read once, when huggingface_hub is imported
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # tests start subprocesses
# Only self-checks of this run, subprocesses included: nothing old is read, no home is written to.
os.environ["SPECLM_CACHE"] = tempfile.mkdtemp(prefix="speclm-tests-")

from tests.tracing import (
    generation_traced,
    import_library,
    num_calls,
    trace_few_examples,
    untraced,
)

with untraced():
    import hypothesis
    import jaxtyping
    import pytest
    import torch
    from beartype import BeartypeConf, FrozenDict, beartype
    from transformers.generation.utils import GenerationMixin  # under the hook, compiled anew

    from tests.network_guard import refused_network

gc.disable()  # until all tests are collected: what is imported stays
atexit.register(shutil.rmtree, os.environ["SPECLM_CACHE"], ignore_errors=True)

# beartype knows what Self means where it decorates a class; the hook gives it only the methods.
check_types = beartype(conf=BeartypeConf(hint_overrides=FrozenDict({Self: Any})))

IS_DEEP = os.environ.get("HYPOTHESIS_PROFILE") == "deep"
# Tests that run for long what others trace; those of the folders have no shape checks either, nor
# have those that are marked.
UNTRACED_FOLDERS = ("benchmarks", "chat", "demo", "docs", "model")
UNTRACED_FILES = (
    "generation/test_chain_targets.py",
    "generation/test_loop.py",
    "generation/test_streaming.py",
    "kernels/test_tree_attention.py",
    "methods/block/test_training.py",
    "methods/draft_model/test_proposer.py",
    "methods/eagle/test_estimated_tau.py",
    "methods/eagle/test_proposer.py",
    "methods/eagle/test_training.py",
    "methods/recycling/test_proposer.py",
    "target/test_static_forward.py",
)
CHECKED_CASES = 1  # of a parametrised test
CHECKED_CALLS = 4  # of a function in one test
is_checked = pytest.StashKey[bool]()  # whether a test checks shapes
is_traced = pytest.StashKey[bool]()  # whether it measures coverage


def check_first_calls(*, typechecker: Any, check: Any = jaxtyping.jaxtyped) -> Callable[[Any], Any]:
    """Return a decorator that checks the shapes of a function's first calls in every test.

    A check takes longer than most functions do, and finds most of what it finds in these. It is
    made at the first call, as that takes milliseconds.
    """

    def decorate(function: Any) -> Any:
        if isclass(function):
            if is_dataclass(function) and isfunction(vars(function).get("__init__")):
                function.__init__ = decorate(function.__init__)
            return function
        checked = None
        key = getattr(function, "__code__", function)

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            __tracebackhide__ = True
            nonlocal checked
            if jaxtyping.config.jaxtyping_disable:
                return function(*args, **kwargs)
            if torch.compiler.is_compiling():  # which cannot follow the checks
                return function(*args, **kwargs)
            num_calls[key] += 1
            if num_calls[key] > CHECKED_CALLS and not IS_DEEP:
                return function(*args, **kwargs)
            if checked is None:
                with untraced():
                    checked = check(function, typechecker=typechecker)
            return checked(*args, **kwargs)

        return call

    return decorate


if os.environ.get("SPECLM_TYPECHECK") != "0":
    jaxtyping.jaxtyped = check_first_calls  # the hook writes this name into modules
    jaxtyping.install_import_hook("speclm", f"{__name__}.check_types")

GenerationMixin.generate = generation_traced(GenerationMixin.generate)

torch.set_num_threads(1)  # sums in one order; several test runs share few cores

hypothesis.settings.register_profile("dev", max_examples=25, deadline=None)
hypothesis.settings.register_profile(
    "ci", max_examples=50, deadline=None, derandomize=True, print_blob=True
)
hypothesis.settings.register_profile("deep", max_examples=5000, deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, Any, Any]:
    """Trace the imports of our modules and no others, nor how assertions are rewritten."""
    import_library()
    with untraced():
        return (yield)


@pytest.hookimpl(trylast=True)  # after the cases that are not to run have been taken out
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Measure coverage and check shapes only in the first cases of tests, as both are slow."""
    num_cases: Counter[str] = Counter()
    for item in items:
        test = item.nodeid.partition("[")[0]
        num_cases[test] += 1
        file = test.partition("::")[0].removeprefix("tests/")
        is_first = num_cases[test] <= CHECKED_CASES and file.split("/")[0] not in UNTRACED_FOLDERS
        item.stash[is_checked] = is_first and not item.get_closest_marker("untraced")
        item.stash[is_traced] = item.stash[is_checked] and file not in UNTRACED_FILES
        trace_few_examples(getattr(item, "function", None))


@pytest.hookimpl(wrapper=True, trylast=True)  # inside of that of pytest-cov
def pytest_runtestloop(session: pytest.Session) -> Generator[None, Any, Any]:
    """Measure no coverage in the process that only tells others which tests to run."""
    is_spread = session.config.getoption("dist", "no") != "no"
    is_worker = hasattr(session.config, "workerinput")
    with untraced() if is_spread and not is_worker else nullcontext():
        return (yield)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, Any, Any]:
    """Measure no coverage of some tests and their fixtures."""
    with nullcontext() if item.stash[is_traced] else untraced():
        return (yield)


def pytest_collection_finish() -> None:
    """Let the garbage collector pass over what was imported, which takes it a second each time."""
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def _shape_checks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Switch the shape checks off in all but the first cases of tests, except in `make deep`."""
    num_calls.clear()
    if not request.node.stash[is_checked] and not IS_DEEP:
        monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture(autouse=True)
def _no_network(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that looks up or reaches another machine, unless it is marked ``network``."""
    is_allowed = request.node.get_closest_marker("network")
    with nullcontext() if is_allowed else refused_network():
        yield


@pytest.fixture
def no_verdicts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every model checked: for tests that plant a fault and build a `SpecModel`."""
    monkeypatch.setenv("SPECLM_CACHE", "")


@pytest.fixture(autouse=True)
def _drafts_in_every_round(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Draft whether it pays or not: the times of tiny models say nothing, and forwards are counted.

    Tests of pausing itself keep the real decisions.
    """
    pausing = sys.modules.get("speclm.adaptive.pausing")  # None where the test decodes nothing
    if pausing is not None and "pausing" not in request.path.name:
        monkeypatch.setattr(pausing.Pausing, "wants_draft", lambda _: True)
        monkeypatch.setattr(pausing.Pausing, "record", lambda _, **__: None)
