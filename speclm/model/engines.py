"""The option ``engine`` of a model: which engine verifies its drafts, and what it has prepared."""

from typing import Any

from torch import Tensor

from speclm.engines import CompileEngine, Engine, GraphEngine
from speclm.errors import OptionError, suggest
from speclm.target import StaticForward, TargetView

_MAX_ENGINES = 4  # that are kept for a model
_EAGER = frozenset({"auto", "eager"})
_KINDS: dict[str, type[Engine]] = {"compile": CompileEngine, "graph": GraphEngine}


def normalize_engine(engine: Any) -> str | Engine:
    """Return the option ``engine``, checked.

    Raises:
        OptionError: If no engine has that name.
    """
    known = sorted({*_EAGER, *_KINDS})
    if isinstance(engine, Engine) or (isinstance(engine, str) and engine in known):
        return engine
    raise OptionError(
        f"engine is {engine!r}, expected one of {known!r} or an Engine; "
        f"{suggest(str(engine), known)}"
    )


class Engines:
    """Keeps what the engines of a model have prepared, while the model stays the same."""

    def __init__(self) -> None:
        """Start with nothing prepared."""
        self._forwards: dict[str | Engine, StaticForward] = {}  # in the order of first use
        self._state: list[object] = []

    def forward(
        self, engine: str | Engine, target: TargetView, *, state: object
    ) -> StaticForward | None:
        """Return what verifies drafts with an engine; None to verify eagerly.

        Args:
            engine: The option.
            target: The model.
            state: Stands for the model; another object means that it has changed.

        Raises:
            OptionError: If no engine has that name, or it cannot run on the model's device.
        """
        engine, model = normalize_engine(engine), target.model
        if isinstance(engine, str) and engine in _EAGER:
            return None
        found = [state, *map(Tensor.data_ptr, (*model.parameters(), *model.buffers()))]
        if found != self._state:  # recorded graphs read weights by their addresses
            self._keep(0)
            self._state = found
        if engine not in self._forwards:
            made = _KINDS[engine]() if isinstance(engine, str) else engine
            obstacle = made.obstacle(target.device)
            if obstacle is not None:
                raise OptionError(
                    f"engine {made.name!r} cannot be used: {obstacle}; pass engine='eager' or "
                    "engine='compile'"
                )
            self._keep(_MAX_ENGINES - 1)
            self._forwards[engine] = StaticForward(target, made)
        return self._forwards[engine]

    def _keep(self, num: int) -> None:
        """Keep what the last `num` engines have prepared."""
        while len(self._forwards) > num:
            self._forwards.pop(next(iter(self._forwards))).close()

    def __reduce__(self) -> tuple[Any, ...]:
        return Engines, ()  # a copy belongs to another model object
