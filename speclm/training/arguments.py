"""Training arguments: defaults for heads, and checks of user settings."""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch
from transformers import TrainingArguments
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
)

from speclm.config import require_count, require_in_range, require_positive
from speclm.errors import OptionError
from speclm.files.atomic import load_json

DEFAULTS: Mapping[str, Any] = {
    "learning_rate": 1e-3,
    "num_train_epochs": 2,
    "per_device_train_batch_size": 8,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,  # fraction of all steps, as save_steps below
    "weight_decay": 0.0,
    "logging_steps": 10,
    "save_steps": 0.1,
    "save_total_limit": 2,
    "train_sampling_strategy": "group_by_length",
    "report_to": "none",
}
"""Default training arguments of all methods.

Source: Cai et al. 2024, where their recipe states a value.
"""

_MIN_COUNTS = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "max_steps": -1,  # as many as the epochs have
    "seed": 0,
    "dataloader_num_workers": 0,
}
_NOT_NEGATIVE = (
    "weight_decay",
    "max_grad_norm",
    "warmup_steps",
    "logging_steps",
    "save_steps",
    "eval_steps",
    "save_total_limit",
)
_MAX = 2**31 - 1


def training_arguments(
    output_dir: str | Path,
    settings: Mapping[str, Any] | None = None,
    *,
    defaults: Mapping[str, Any] | None = None,
) -> TrainingArguments:
    """Return arguments for `Trainer`.

    Args:
        output_dir: Where checkpoints are written.
        settings: Any fields of ``TrainingArguments``; they override all defaults.
        defaults: Defaults of a method, which override `DEFAULTS`.

    Raises:
        OptionError: If a field does not exist, its value is invalid, or a package that it needs is
            not installed.
    """
    known = {field.name for field in fields(TrainingArguments) if field.init}
    settings = dict(settings or {})
    for name in settings:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "see its documentation for the fields"
            raise OptionError(f"TrainingArguments has no field {name!r}; {hint}")
    values = {**DEFAULTS, **(defaults or {}), **settings}
    _require_types(settings)
    _require_trackers(values.get("report_to"))
    require_positive("learning_rate", values["learning_rate"])
    max_steps = values.get("max_steps", -1)  # overrides the epochs
    if isinstance(max_steps, int) and max_steps <= 0:
        require_positive("num_train_epochs", values["num_train_epochs"])
    for name, low in _MIN_COUNTS.items():
        if name in values:
            require_count(name, values[name], low=low, high=_MAX)
    for name in _NOT_NEGATIVE:
        if values.get(name) is not None:
            require_in_range(name, values[name], low=0.0, high=_MAX)
    pinning = {"dataloader_pin_memory": torch.accelerator.is_available()}
    try:
        return TrainingArguments(str(output_dir), **{**pinning, **values})
    except (ValueError, TypeError, ImportError, OSError) as error:  # some values name a file
        raise OptionError(
            f"TrainingArguments refuses {settings!r} ({error}); correct the value"
        ) from error


def _require_types(settings: Mapping[str, Any]) -> None:
    """Check the types of switches and counts; Transformers takes any text as true."""
    hints = get_type_hints(TrainingArguments)
    for name, value in settings.items():
        kinds = set(get_args(hints[name]) or (hints[name],))
        wanted = kinds - {type(None)}
        if (value is None and kinds != wanted) or name in _MIN_COUNTS:
            continue
        if wanted == {bool} and not isinstance(value, bool):
            raise OptionError(f"{name} is {value!r}, expected true or false; pass one of them")
        if wanted == {int} and (isinstance(value, bool) or not isinstance(value, int)):
            raise OptionError(f"{name} is {value!r}, expected a whole number; pass one")


def parse_settings(texts: Iterable[str]) -> dict[str, Any]:
    """Parse ``key=value`` settings; a value is JSON, or else plain text.

    Raises:
        OptionError: If a setting has no key or no equals sign.
    """
    settings: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not key or not equals:
            raise OptionError(f"training argument is {text!r}, expected key=value such as seed=3")
        try:
            settings[key] = load_json(value)
        except ValueError:
            settings[key] = value
    return settings


def _require_trackers(report_to: Any) -> None:
    """Check the names in ``report_to``: one or a list; "none" and "all" must be single."""
    names = list(report_to) if isinstance(report_to, list | tuple) else [report_to]
    if len(names) == 1 and names[0] in ("none", "all"):
        return
    installed = get_available_reporting_integrations()  # type: ignore[no-untyped-call]
    installed.append("flyte")  # Transformers never lists it
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            near = difflib.get_close_matches(str(name), INTEGRATION_TO_CALLBACK, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "or 'none' by itself; correct it"
            raise OptionError(
                f"report_to has {name!r}, expected some of {sorted(INTEGRATION_TO_CALLBACK)!r}, "
                f"{hint}"
            )
        if name not in installed:
            raise OptionError(
                f"report_to has {name!r}, whose package is not installed or not set up; run: pip "
                f"install {name.replace('_', '-')}, or leave it out"
            )
