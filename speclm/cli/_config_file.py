"""``speclm train --config``: options from a YAML or JSON file, below those of the command line.

Imports no PyTorch: the help of the commands needs this module.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from inspect import Parameter
from itertools import takewhile
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, get_args

import typer
import yaml

from speclm.errors import OptionError, reason_of, shown, suggest
from speclm.files.atomic import MAX_LEVELS, require_shallow
from speclm.methods.registry import registered_methods

MAX_BYTES = 2**20
"""Largest file of options."""

_RECIPE, _TRAINING_ARGS = "recipe", "training_args"
_FIELDS = {
    "output_dir": "out",
    "num_train_epochs": "epochs",
    "learning_rate": "learning-rate",
    "per_device_train_batch_size": "batch-size",
    "seed": "seed",
    "report_to": "report-to",
}
"""Fields of ``TrainingArguments`` with an option, which they would override even if it is given."""

_KINDS: Mapping[type, tuple[Any, str]] = {
    bool: (bool, "true or false"),
    int: (int, "a whole number"),
    float: ((int, float), "a number"),
    str: (str, "a text, in quotes if it looks like something else"),
    Path: (str, "a path, in quotes if it looks like something else"),
}

_CONSTANTS: Mapping[str, bool | None] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
_INTEGER = re.compile(r"[-+]?[0-9]+")
_INTEGER_OF_BASE = re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


def config_parameter(recipe: str, parameters: Iterable[Parameter]) -> Parameter:
    """Return the parameter ``--config`` of a recipe's command.

    The values of the file become the defaults of the command, so that its other options take
    precedence. Those of ``training_args`` are added by `with_training_args`.

    Args:
        recipe: Name of the command.
        parameters: The command's other parameters, annotated for Typer.
    """
    known = {parameter.name: parameter for parameter in parameters}

    def read(context: Any, path: Path | None) -> Path | None:
        if path is not None:
            try:
                options = _by_name(read_mapping(path))
                _require_recipe(options.pop(_RECIPE, recipe), recipe)
                context.meta[_TRAINING_ARGS] = _settings(options.pop(_TRAINING_ARGS, {}))
                context.default_map = {
                    name: _option(name, value, known, recipe) for name, value in options.items()
                }
            except (ValueError, OverflowError) as error:  # the latter of a number that is too large
                raise OptionError(f"--config {str(path)!r}: {error}") from error
        return path

    option = typer.Option(
        help="YAML or JSON file of options; those of the command line take precedence.",
        callback=read,
        is_eager=True,
    )
    kind = Annotated[Path | None, option]
    return Parameter("config", Parameter.KEYWORD_ONLY, annotation=kind, default=None)


def with_training_args(context: Any, texts: list[str] | None) -> list[str] | None:
    """Return the values of ``--training-arg`` after those of ``--config``, which they override."""
    return [*context.meta.get(_TRAINING_ARGS, ()), *(texts or ())] or None


def read_mapping(path: Path) -> dict[str, Any]:
    """Read a mapping from a file: JSON if its name ends in ``.json``, and YAML otherwise.

    YAML is read by the core schema of its version 1.2: ``1e-3`` is a number, and ``no`` a text.
    Anchors, aliases, tags and further documents are refused, and so are repeated keys.

    Raises:
        ValueError: If it cannot be read, is larger than `MAX_BYTES` or holds anything else.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ValueError(f"it cannot be read ({error}); name a file") from error
    if len(content) > MAX_BYTES:
        raise ValueError(f"it has more than {MAX_BYTES} bytes, expected options; name another file")
    parse = _json if path.suffix.lower() == ".json" else _yaml
    try:
        found = parse(content.decode("utf-8-sig"))
        json.dumps(found, ensure_ascii=False).encode()  # half a character cannot be passed on
    except ValueError as error:
        raise ValueError(f"it cannot be parsed ({error}); correct the file") from error
    if not isinstance(found, dict):
        raise ValueError(
            f"it holds {shown(found)}, expected options such as `batch-size: 8`; correct the file"
        )
    return found


def _json(text: str) -> Any:
    try:
        found = json.loads(text, object_pairs_hook=_unique)
    except RecursionError as error:
        raise ValueError(f"it is nested too deeply: {error}") from error
    require_shallow(found)
    return found


def _unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Return a mapping of pairs; a key that occurs twice is an error."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{key!r} occurs twice")
        found[key] = value
    return found


def _yaml(text: str) -> Any:
    events = yaml.parse(text, yaml.SafeLoader)
    try:
        next(events)  # the stream begins
        if isinstance(next(events), yaml.StreamEndEvent):
            return None
        found = _value(next(events), events, level=0)
        next(events)  # the document ends
        if not isinstance(next(events), yaml.StreamEndEvent):
            raise ValueError("it has several documents, expected one")
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = "" if mark is None else f"line {mark.line + 1}: "
        raise ValueError(f"{where}{error.problem}") from error
    except (yaml.YAMLError, OverflowError) as error:  # of an escape such as "\U80000000"
        raise ValueError(reason_of(error)) from error
    return found


def _value(event: Any, events: Iterator[Any], *, level: int) -> Any:
    """Return the value that begins with an event of PyYAML's parser."""
    where = f"line {event.start_mark.line + 1}"
    if isinstance(event, yaml.AliasEvent) or event.anchor or event.tag:
        raise ValueError(f"{where}: found an anchor, alias or tag, expected the value itself")
    if level > MAX_LEVELS:
        raise ValueError(f"{where}: it is nested deeper than {MAX_LEVELS} levels")
    if isinstance(event, yaml.ScalarEvent):
        return _scalar(event.value) if event.implicit[0] else event.value
    if isinstance(event, yaml.SequenceStartEvent):
        items = takewhile(lambda item: not isinstance(item, yaml.SequenceEndEvent), events)
        return [_value(item, events, level=level + 1) for item in items]
    keys = takewhile(lambda key: not isinstance(key, yaml.MappingEndEvent), events)
    return _unique(_pair(key, events, level=level + 1) for key in keys)


def _pair(event: Any, events: Iterator[Any], *, level: int) -> tuple[str, Any]:
    key = _value(event, events, level=level)
    if not isinstance(key, str):
        raise ValueError(
            f"line {event.start_mark.line + 1}: {shown(key)} is a key, expected a text; write it "
            "in quotes"
        )
    return key, _value(next(events), events, level=level)


def _scalar(text: str) -> Any:
    """Return what a text without quotes means in the core schema."""
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    if _INTEGER.fullmatch(text):
        return int(text)
    if _INTEGER_OF_BASE.fullmatch(text):
        return int(text, base=0)
    if _FLOAT.fullmatch(text):
        return float(text)
    return float(text.replace(".", "")) if _NOT_FINITE.fullmatch(text) else text


def _by_name(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return values by the names of parameters."""
    try:
        return _unique((key.replace("-", "_"), value) for key, value in found.items())
    except ValueError as error:
        raise ValueError(f"{error}, once with - and once with _; drop one of them") from error


def _require_recipe(found: object, recipe: str) -> None:
    if found != recipe:
        raise ValueError(
            f"recipe is {shown(found)}, expected {recipe!r}; run the other recipe or correct it"
        )


def _settings(found: object) -> list[str]:
    """Return values of ``--training-arg``."""
    if not isinstance(found, dict):
        raise ValueError(
            f"training_args is {shown(found)}, expected a mapping such as {{bf16: true}}; correct "
            "it"
        )
    for key in found:
        if key in _FIELDS:
            raise ValueError(
                f"training_args has {key!r}, expected fields without an option of their own; "
                f"write {_FIELDS[key]!r} above training_args"
            )
    return [f"{key}={json.dumps(value)}" for key, value in found.items()]


def _option(name: str, value: Any, known: Mapping[str, Parameter], recipe: str) -> Any:
    """Return the value of an option, whose type is checked."""
    shown_name = name.replace("_", "-")
    if name not in known or name == "training_arg":
        raise ValueError(f"unknown option {shown_name!r}; {_remedy(name, known, recipe)}")
    parameter = known[name]
    if value is None and parameter.default is None:
        return None
    annotation, option = get_args(parameter.annotation)
    kinds = [kind for kind in get_args(annotation) or (annotation,) if kind is not NoneType]
    if len(kinds) > 1 or kinds[0] not in _KINDS:
        return value  # of a method that somebody added; Typer checks it
    types, expected = _KINDS[kinds[0]]
    is_bool = isinstance(value, bool)
    if not isinstance(value, types) or is_bool != (kinds[0] is bool) or "\0" in str(value):
        raise ValueError(f"{shown_name} is {shown(value)}, expected {expected}; correct it")
    low, high = option.min, option.max
    if (low is not None and not value >= low) or (high is not None and not value <= high):
        most = "" if high is None else f" and at most {high}"
        raise ValueError(
            f"{shown_name} is {shown(value)}, expected at least {low}{most}; correct it"
        )
    return float(value) if kinds[0] is float else value


def _remedy(name: str, known: Mapping[str, Parameter], recipe: str) -> str:
    """Return what to do about an unknown option."""
    others = [
        other.name
        for method in registered_methods().values()
        for other in method.recipes
        if name in {field.name for field in fields(other.options)}
    ]
    if others:
        return f"it is one of {', '.join(others)} and not of {recipe}, drop it"
    from transformers import TrainingArguments

    if name in {field.name for field in fields(TrainingArguments)}:
        return f"it is a field of TrainingArguments, write {name!r} below training_args"
    names = [option.replace("_", "-") for option in known if option != "training_arg"]
    return suggest(name.replace("_", "-"), [*names, "training-args", _RECIPE])
