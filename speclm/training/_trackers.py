"""Checks that trackers such as TensorBoard are known and installed."""

import difflib
from typing import Any

from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
)

from speclm.errors import OptionError

_NONE_OR_ALL = ("none", "all")


def require_trackers(report_to: Any) -> None:
    """Check what ``report_to`` of training arguments names.

    Args:
        report_to: A name or a list of names; "none" or "all" only as the one name.

    Raises:
        OptionError: If one is no name, or its package is not installed.
    """
    names = list(report_to) if isinstance(report_to, list | tuple) else [report_to]
    if len(names) == 1 and names[0] in _NONE_OR_ALL:
        return
    installed = get_available_reporting_integrations()  # type: ignore[no-untyped-call]
    installed.append("flyte")  # Transformers does not list it, whether it is there or not
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
