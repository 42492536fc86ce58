"""Notices what was done to a model since it was checked, quickly enough to look at every call."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast
from weakref import ref

from torch import nn
from torch.nn.modules import module as torch_module
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from speclm.attention import attention_configs
from speclm.self_check.changes import STEP_METHODS, is_known, only_reads
from speclm.self_check.check import check_model
from speclm.self_check.verdict import Backend, SelfCheck
from speclm.target import TargetView, replaced_forward

_MAX_KNOWN = 8
_SWITCHED = {"_attn_implementation_internal", "_experts_implementation_internal"}
"""Settings of a config that change for the time of a generation."""
_ALWAYS_ALIKE = frozenset(
    {nn.Embedding, nn.Identity, nn.LayerNorm, nn.Linear, nn.ModuleDict, nn.ModuleList, nn.RMSNorm}
)
"""Classes that compute the same in training mode, by exact class. Transformers makes some anew in
training mode, as when embeddings are resized."""


@dataclass(frozen=True, slots=True)
class _Parts:
    """Where to look for changes, as long as a model consists of the same modules.

    Args:
        configs: Of the modules.
        kinds: Classes of the modules.
        strange: Modules of other packages, which may have switches.
        slots: Modules and their attributes that are functions.
    """

    configs: list[PretrainedConfig]
    kinds: list[type]
    strange: list[ref[nn.Module]]
    slots: list[tuple[ref[nn.Module], str]]


@dataclass(frozen=True, slots=True, eq=False)
class _State:
    """What decides what a model computes, its weights apart, at one time.

    Modules are referred to weakly, so that no weights are kept.

    Args:
        marks: Of each module: which it is, of which class, and what was put over its forward.
        sizes: Numbers of attributes of the module objects; another one may be a new function.
        parts: Where the settings were found.
        settings: Of the model as a whole.
    """

    marks: list[object]
    sizes: list[int]
    parts: _Parts
    settings: list[object]

    def is_like(self, other: "_State") -> bool:
        """Return whether the verdict on one state holds for the other."""
        return (
            _equal(self.marks, other.marks)
            and self.parts.slots == other.parts.slots
            and _equal(self.settings, other.settings)
        )


class Watch:
    """Keeps the verdict on a model up to date.

    Attributes:
        check: The verdict on the model as it was at the last look.
        in_training: What was in training mode then, in words; None when nothing was.
    """

    def __init__(self, target: TargetView) -> None:
        """Have a model checked."""
        self.in_training: str | None = None
        self._state: _State | None = None
        self._known: list[tuple[_State, SelfCheck]] = []
        self.check = SelfCheck(Backend.PLAIN, "not checked yet")
        self.look(target)

    def look(self, target: TargetView) -> None:
        """Check the model again if it is not what it was, or was found to be before.

        Costs a fraction of a millisecond if it is. What counts is what decides how forwards are
        computed: modules, hooks, replaced methods, configs, dtype and device. Weights do not.
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
        self.check = check  # first: another thread takes it for that of the state
        self._state = state

    def __reduce__(self) -> tuple[Any, ...]:
        return _unseen, (self.check,)  # a copy is about another model object

    def _read(self, model: PreTrainedModel) -> _State:
        """Return the state of a model, which is the last one itself if nothing was changed."""
        marks, sizes, training = _walk(model)
        self.in_training = None if training is None else _name(training, model)
        last = self._state
        if last is None or not _equal(last.marks, marks):
            parts = _parts(model)
            return _State(marks, sizes, parts, _settings(model, parts))
        parts = last.parts
        if sizes != last.sizes:
            found = _parts(model)
            parts = parts if found.slots == parts.slots else found
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
    """Return what is in training mode, in words: the model or the first such module."""
    module = next(filter(_is_training, _modules(model)), None)
    return None if module is None else _name(module, model)


def may_draw(model: nn.Module) -> bool:
    """Return whether forwards may draw random numbers, for all that is known of the modules.

    They may in training mode, and where hooks or code of other packages run.
    """
    modules = _modules(model)
    return (
        any(map(_is_training, modules))
        or any(any(_over_forward(module)) for module in modules)
        or any(_is_strange(kind) for kind in set(map(type, modules)))
    )


def _is_training(module: nn.Module) -> bool:
    return module.training and type(module) not in _ALWAYS_ALIKE


def _is_strange(kind: type) -> bool:
    return not is_known(kind.__module__) and not kind.__module__.startswith("speclm.")


def _name(wanted: nn.Module, model: nn.Module) -> str:
    name = next(name for name, module in model.named_modules() if module is wanted)
    return f"module {name!r}" if name else "the model"


def _modules(model: nn.Module) -> list[nn.Module]:
    """Return all modules, in a tenth of the time of the model's own method."""
    modules = [model]
    for module in modules:  # which grows on the way
        children = module._modules
        if children:
            modules += [child for child in children.values() if child is not None]
    return modules


def _walk(model: nn.Module) -> tuple[list[object], list[int], nn.Module | None]:
    """Return marks and sizes of all modules, and the first one in training mode.

    Written for speed: it looks at hundreds of modules at every call.
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
    """Return what was put over a module's forward, or before or after it."""
    hooks, pre_hooks = (
        [hook for hook in list(found.values()) if not only_reads(hook)]
        for found in (module._forward_hooks, module._forward_pre_hooks)
    )
    return replaced_forward(module), hooks, pre_hooks


def _parts(model: nn.Module) -> _Parts:
    slots = list[tuple[ref[nn.Module], str]]()
    strange = list[ref[nn.Module]]()
    kinds = dict[type, None]()
    for module in model.modules():
        kinds[type(module)] = None
        if _is_strange(type(module)):
            strange.append(ref(module))
        for name, value in vars(module).items():
            # `patch` puts a `generate` there, which is not what regular generation calls.
            if callable(value) and name not in {"forward", "generate"}:
                slots.append((ref(module), name))
    return _Parts(attention_configs(model), list(kinds), strange, slots)


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
        *(vars(module()).get(name) for module, name in parts.slots),
        *(_switches(module()) for module in parts.strange),
        *_of_configs(parts.configs),
    ]


def _switches(module: nn.Module | None) -> dict[str, bool | str]:
    """Return the attributes of a module that say yes or no or name something.

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
        name = getattr(name, "previous", name)  # trees are attached to it at the moment
        experts = getattr(config, "_experts_implementation", None)
        yield name
        yield cast("Any", ALL_ATTENTION_FUNCTIONS).get(name)
        yield "grouped_mm" if experts == "batched_mm" else experts  # which steps switch to
        yield {key: value for key, value in vars(config).items() if key not in _SWITCHED}


def _equal(one: list[object], other: list[object]) -> bool:
    """Return whether things are equal; those that cannot be compared are not."""
    try:
        return one == other
    except Exception:  # noqa: BLE001 - any object may be a setting
        return False
