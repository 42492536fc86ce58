"""What an exported folder runs inside the server of Transformers."""

import json
import logging
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedModel

from speclm.errors import OptionError, SpeclmError, reason_of
from speclm.serving.record import load_served

_log = logging.getLogger("speclm")

_SERVER = "transformers.cli.serving.server"
_OTHER_DECODING = ("--continuous-batching", "--compile")
_MODEL = "_speclm_served"
# Those of a streamer whose client has left are the server's own, and derive from Exception only.
_ERRORS = (ArithmeticError, LookupError, OSError, RuntimeError, SpeclmError, TypeError, ValueError)


def generate(*args: Any, model: PreTrainedModel, code: str | None = None, **kwargs: Any) -> Any:
    """Answer ``model.generate`` of a base in an exported folder.

    The heads are loaded at the first call and stay with the model object. Calls of several threads
    take turns.

    Args:
        *args: As for ``generate``.
        model: The base.
        code: File of the exported code, as Transformers keeps it.
        **kwargs: As for `SpecModel.generate`.

    Returns:
        What `SpecModel.generate` returns.

    Raises:
        SpeclmError: As `SpecModel.generate`. Inside the server its message goes to the client: with
            status 400 if the request is wrong, and 500 otherwise.
        CheckpointError: If the base is from no exported folder, or its heads are damaged.
    """
    is_loaded = _MODEL in vars(model)
    try:
        if not is_loaded:
            # A cache elsewhere would keep the base, which it refers to, when the server unloads it.
            found = vars(model).setdefault(_MODEL, load_served(model, commit=_commit_of(code)))
            is_loaded = True
            proposer, check = type(found.proposer).__name__, found.self_check
            _log.warning("%s drafts; verification: %s", proposer, check.verification.value)
        return vars(model)[_MODEL].generate(*args, **kwargs)
    except _ERRORS as error:
        if _SERVER not in sys.modules:
            raise
        is_wrong = is_loaded and isinstance(error, ValueError | TypeError | LookupError)
        raise _answer(error, 400 if is_wrong else 500, streams="streamer" in kwargs) from error


class ServedTokenizer:
    """The tokenizer of an exported folder, which only a server that trusts its code can load."""

    @classmethod
    def register_for_auto_class(cls) -> None:
        """Do nothing: what is saved is the tokenizer."""

    @classmethod
    def from_pretrained(cls, name: str | Path, **options: Any) -> Any:
        """Return the tokenizer, when the server starts or loads the model.

        Raises:
            OptionError: If the server was started with an option that decodes by other means.
        """
        require_drafts(sys.argv if _SERVER in sys.modules else ())
        return AutoTokenizer.from_pretrained(name, **options)


def require_drafts(arguments: Sequence[str]) -> None:
    """Check that the server was started with no option that bypasses drafts.

    Args:
        arguments: Its command line.

    Raises:
        OptionError: If it was.
    """
    found = [name for name in _OTHER_DECODING if name in arguments]
    if found:
        raise OptionError(
            f"the server was started with {found[0]}, which decodes without drafts, expected none "
            f"of {list(_OTHER_DECODING)!r}; leave it out, or serve the base itself"
        )


def _commit_of(code: str | None) -> str | None:
    """Return the commit of code from the hub, which is kept in a folder of that name."""
    name = Path(code or "").parent.parent.name
    return name if re.fullmatch("[0-9a-f]{40}", name) else None


def _answer(error: Exception, status: int, *, streams: bool) -> Exception:
    """Return the error that the server sends to the client as an answer."""
    from starlette.exceptions import HTTPException

    text = str(error) if isinstance(error, SpeclmError) else reason_of(error)
    _log.warning("a request fails: %s", text, exc_info=error if status == 500 else None)
    # In a stream it becomes a part of a JSON text as it is.
    return HTTPException(status, detail=json.dumps(text)[1:-1] if streams else text)
