"""Says what is traced for coverage. Tracing doubles the time of all Python code that runs, also of
the libraries that ours calls."""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache, wraps
from importlib import import_module
from pkgutil import walk_packages
from typing import Any

from coverage.tracer import CTracer

TRACED_GENERATIONS = 3  # of a test; no line of ours is in regular generation
TRACED_EXAMPLES = 10  # of a property
# Methods that run for long and often in a test, and how many calls of them are traced.
FEW_TRACED = (
    ("speclm.target", "TargetView", "run", 4),
    ("speclm.testing.contract", "_Driver", "run", 2),
)
# Imported by modules of speclm, which are traced.
FOREIGN = ("accelerate", "transformers.trainer")
OMITTED = (  # from coverage, see pyproject.toml
    "speclm.__main__",
    "speclm.kernels._triton",
    "speclm.webui.page",
)

num_calls: Counter[Any] = Counter()  # of a test, by function


def is_traced() -> bool:
    """Return whether this thread measures coverage at present."""
    return isinstance(sys.gettrace(), CTracer)


@contextmanager
def untraced() -> Iterator[None]:
    """Measure no coverage inside the block."""
    tracer = sys.gettrace()
    if not isinstance(tracer, CTracer):
        yield
        return
    tracer.stop()
    try:
        yield
    finally:
        tracer.start()


def first_traced(function: Callable[..., Any], num: int) -> Callable[..., Any]:
    """Return a function whose first calls in a test are traced, and none of the later ones."""

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        num_calls[call] += 1
        with nullcontext() if num_calls[call] <= num else untraced():
            return function(*args, **kwargs)

    call.num_traced = num
    return call


def generation_traced(generate: Callable[..., Any]) -> Callable[..., Any]:
    """Return `generate` of Transformers that is traced in the first calls of our decoding only."""
    ours, regular = first_traced(generate, TRACED_GENERATIONS), first_traced(generate, 0)

    @wraps(generate)
    def call(*args: Any, **kwargs: Any) -> Any:
        is_regular = kwargs.get("custom_generate") is None
        return (regular if is_regular else ours)(*args, **kwargs)

    return call


def trace_few_examples(test: Any) -> None:
    """Trace only the first examples of a property, if a test is one."""
    handle = getattr(test, "hypothesis", None)
    if handle is not None and not hasattr(handle.inner_test, "num_traced"):
        handle.inner_test = first_traced(handle.inner_test, TRACED_EXAMPLES)


@cache
def import_library() -> None:
    """Import all of speclm, if this process is traced, so that later imports need not be."""
    if not is_traced():
        return
    with untraced():
        for name in FOREIGN:
            import_module(name)
    import speclm

    for module in walk_packages(speclm.__path__, "speclm."):
        if not module.name.startswith(OMITTED):
            import_module(module.name)
    for name, owner, method, num in FEW_TRACED:
        kind = getattr(import_module(name), owner)
        setattr(kind, method, first_traced(getattr(kind, method), num))
