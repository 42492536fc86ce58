"""Detect changes of a model since its check, fast enough to look in every call."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast
from weakref import ref

from torch import nn
from torch.nn.modules import module as torch_module
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from speclm.attention import attention_configs
from speclm.self_check.check import check_model
from speclm.self_check.fingerprint import STEP_METHODS, is_known, only_reads
from speclm.self_check.verdict import SelfCheck, Verification
from speclm.target import TargetView, replaced_forward

_MAX_KNOWN = 8
_SWITCHED = {"_attn_implementation_internal", "_experts_implementation_internal"}
"""Settings of a config that change during a generation."""
_ALWAYS_ALIKE = frozenset(
    {nn.Embedding, nn.Identity, nn.LayerNorm, nn.Linear, nn.ModuleDict, nn.ModuleList, nn.RMSNorm}
)
"""Exact classes that compute the same in training mode. Transformers creates some of them in
training mode, for example when embeddings are resized."""


@dataclass(frozen=True, slots=True)
class _Parts:
    """Where to look for changes while a model consists of the same modules.

    Args:
        configs: Configs of the modules.
        kinds: Classes of the modules.
        foreign: Modules of other packages, which may have switches.
        functions: Modules and the names of their attributes that are functions.
    """

    configs: list[PretrainedConfig]
    kinds: list[type]
    foreign: list[ref[nn.Module]]
    functions: list[tuple[ref[nn.Module], str]]


@dataclass(frozen=True, slots=True, eq=False)
class _State:
    """Everything except weights that decides what a model computes, at one time.

    Holds modules weakly, so that it keeps no weights alive.

    Args:
        marks: Identity and class of each module, and hooks and replacements of its forward.
        sizes: Numbers of attributes of the module objects; a new attribute may be a function.
        parts: Where the settings were found.
        settings: Settings of the whole model.
    """

    marks: list[object]
    sizes: list[int]
    parts: _Parts
    settings: list[object]

    def is_like(self, other: "_State") -> bool:
        """Return whether the verdict on one state holds for the other."""
        return (
            _equal(self.marks, other.marks)
            and self.parts.functions == other.parts.functions
            and _equal(self.settings, other.settings)
        )


class Watch:
    """Keep the verdict on a model up to date.

    Attributes:
        check: The verdict on the model at the last look.
        in_training: What was in training mode then, in words; None if nothing was.
    """

    def __init__(self, target: TargetView) -> None:
        """Check a model."""
        self.in_training: str | None = None
        self._state: _State | None = None
        self._known: list[tuple[_State, SelfCheck]] = []
        self.check = SelfCheck(Verification.REGULAR, "not checked yet")
        self.look(target)

    @property
    def state(self) -> object:
        """Stands for the model as it was at the last look; another object after a change."""
        return self._state

    def look(self, target: TargetView) -> None:
        """Check the model again if it has changed to a state without a verdict.

        Takes a fraction of a millisecond if nothing has changed. Compares everything that decides
        how forwards compute, except weights: modules, hooks, replaced methods, configs, dtype and
        device.
        """
        state = self._read(target.model)
        if state is self._state:
            return
        target.refresh()
        check = next((check for known, check in self._known if known.is_like(state)), None)
        if check is None:
            check = check_model(target)
            if check.is_lasting:
                self._known = [(state, check), *self._known[: _MAX_KNOWN - 1]]
        self.check = check  # before the state: another thread may read both
        self._state = state

    def __reduce__(self) -> tuple[Any, ...]:
        return _unseen, (self.check,)  # a copy belongs to another model object

    def _read(self, model: PreTrainedModel) -> _State:
        """Return the state of a model: the same object as last time if nothing has changed."""
        marks, sizes, training = _marks(model)
        self.in_training = None if training is None else _name(training, model)
        last = self._state
        if last is None or not _equal(last.marks, marks):
            parts = _parts(model)
            return _State(marks, sizes, parts, _settings(model, parts))
        parts = last.parts
        if sizes != last.sizes:
            found = _parts(model)
            parts = parts if found.functions == parts.functions else found
        settings = _settings(model, parts)
        if parts is not last.parts or not _equal(last.settings, settings):
            return _State(marks, sizes, parts, settings)
        last.sizes[:] = sizes
        return last


def _unseen(check: SelfCheck) -> Watch:
    watch = Watch.__new__(Watch)
    watch.check, watch.in_training, watch._state, watch._known = check, None, None, []
    return watch


def first_in_training(model: nn.Module) -> str | None:
    """Return the first module in training mode, in words; None if there is none."""
    module = next(filter(_is_training, _modules(model)), None)
    return None if module is None else _name(module, model)


def may_draw(model: nn.Module) -> bool:
    """Return whether forwards may draw random numbers.

    They may in training mode, and with hooks or code of other packages.
    """
    modules = _modules(model)
    return (
        any(map(_is_training, modules))
        or any(any(_over_forward(module)) for module in modules)
        or any(_is_foreign(kind) for kind in set(map(type, modules)))
    )


def _is_training(module: nn.Module) -> bool:
    return module.training and type(module) not in _ALWAYS_ALIKE


def _is_foreign(kind: type) -> bool:
    return not is_known(kind.__module__) and not kind.__module__.startswith("speclm.")


def _name(wanted: nn.Module, model: nn.Module) -> str:
    name = next(name for name, module in model.named_modules() if module is wanted)
    return f"module {name!r}" if name else "the model"


def _modules(model: nn.Module) -> list[nn.Module]:
    """Return all modules, ten times as fast as the model's own method."""
    modules = [model]
    for module in modules:  # grows in the loop
        children = module._modules
        if children:
            modules += [child for child in children.values() if child is not None]
    return modules


def _marks(model: nn.Module) -> tuple[list[object], list[int], nn.Module | None]:
    """Return marks and sizes of all modules, and the first one in training mode.

    Written for speed: each call reads hundreds of modules.
    """
    modules = _modules(model)
    states = [module.__dict__ for module in modules]
    marks: list[object] = [*map(ref, modules), *map(type, modules)]
    for index, state in enumerate(states):
        if state["_forward_hooks"] or state["_forward_pre_hooks"] or "forward" in state:
            over = _over_forward(modules[index])
            if any(over):
                marks += (index, over)
    training = next(
        (
            modules[i]
            for i, state in enumerate(states)
            if state["training"] and type(modules[i]) not in _ALWAYS_ALIKE
        ),
        None,
    )
    return marks, list(map(len, states)), training


def _over_forward(module: nn.Module) -> tuple[object, ...]:
    """Return the replacement of a module's forward, its hooks and its pre-hooks."""
    hooks, pre_hooks = (
        [hook for hook in list(found.values()) if not only_reads(hook)]
        for found in (module._forward_hooks, module._forward_pre_hooks)
    )
    return replaced_forward(module), hooks, pre_hooks


def _parts(model: nn.Module) -> _Parts:
    functions = list[tuple[ref[nn.Module], str]]()
    foreign = list[ref[nn.Module]]()
    kinds = dict[type, None]()
    for module in model.modules():
        kinds[type(module)] = None
        if _is_foreign(type(module)):
            foreign.append(ref(module))
        for name, value in vars(module).items():
            # `patch` sets `generate`, which regular generation does not call.
            if callable(value) and name not in {"forward", "generate"}:
                functions.append((ref(module), name))
    return _Parts(attention_configs(model), list(kinds), foreign, functions)


def _settings(model: PreTrainedModel, parts: _Parts) -> list[object]:
    kind, own = type(model), vars(model)
    return [
        model.dtype,
        model.device,
        model.config,
        *torch_module._global_forward_hooks.values(),
        "pre-hooks",
        *torch_module._global_forward_pre_hooks.values(),
        "methods",
        *(getattr(kind, name, None) for name in STEP_METHODS),
        *(own.get(name) for name in STEP_METHODS if name != "forward"),
        *(cast("Any", kind).forward for kind in parts.kinds),
        *(vars(module()).get(name) for module, name in parts.functions),
        *(_switches(module()) for module in parts.foreign),
        *_of_configs(parts.configs),
    ]


def _switches(module: nn.Module | None) -> dict[str, bool | str]:
    """Return the attributes of a module that are booleans or names.

    Numbers are left out: many are counters, which forwards change.
    """
    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, bool | str) and name != "training"
    }


def _of_configs(configs: Iterable[PretrainedConfig]) -> Iterable[object]:
    for config in configs:
        name = config._attn_implementation
        name = getattr(name, "previous", name)  # tree attention is attached now
        experts = getattr(config, "_experts_implementation", None)
        yield name
        yield cast("Any", ALL_ATTENTION_FUNCTIONS).get(name)
        yield "grouped_mm" if experts == "batched_mm" else experts  # decode steps switch to it
        yield {key: value for key, value in vars(config).items() if key not in _SWITCHED}


def _equal(one: list[object], other: list[object]) -> bool:
    """Return whether two lists are equal; objects that cannot be compared are not."""
    try:
        return one == other
    except Exception:  # noqa: BLE001 - any object may be a setting
        return False
