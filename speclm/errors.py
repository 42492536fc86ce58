"""The exceptions that speclm raises on purpose.

All derive from `SpeclmError` and from a fitting builtin, so both ``except SpeclmError`` and
``except ValueError`` work. Messages say what was found, what was expected and what to do.
"""

import difflib
import reprlib
from collections.abc import Iterable

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80


def shown(value: object) -> str:
    """Return a value as text for a message; long and nested values are cut."""
    return _SHORT.repr(value)


def reason_of(error: Exception) -> str:
    """Return the type and the message of an error on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def suggest(name: str, known: Iterable[str]) -> str:
    """Return what to do about an unknown option: correct it to a similar one, or drop it.

    Example:
        >>> suggest("num_draft_token", ["num_draft_tokens", "tree"])
        "did you mean 'num_draft_tokens'?"
    """
    near = difflib.get_close_matches(str(name).lower(), list(known), n=1)
    return f"did you mean {near[0]!r}?" if near else f"drop {name!r}"


class SpeclmError(Exception):
    """Base of all errors raised by speclm."""


class OptionError(SpeclmError, ValueError):
    """An argument has a value that cannot be honoured."""


class UnknownNameError(SpeclmError, LookupError):
    """A name is not in a registry, not a folder and not found on the hub."""


class VocabularyMismatchError(SpeclmError, ValueError):
    """Two models that must share a vocabulary do not."""


class PromptError(SpeclmError, ValueError):
    """The prompt is empty, padded on the wrong side or too long for the model."""


class DataError(SpeclmError, ValueError):
    """A file of JSON lines, or a row of it, cannot be used."""


class TreeBudgetError(SpeclmError, ValueError):
    """A tree has more nodes or levels than a round may hold."""


class TopologyError(SpeclmError, ValueError):
    """A list of parents does not describe a tree."""


class DraftError(SpeclmError, ValueError):
    """A proposer returned something that is not a valid draft."""


class ProposerContractError(SpeclmError, AssertionError):
    """A proposer broke a rule of its interface; raised by `speclm.testing.check_proposer`."""


class CacheError(SpeclmError, TypeError):
    """A key/value cache cannot be rolled back, taken over or extended as asked."""


class KernelError(SpeclmError, ValueError):
    """A kernel cannot compute with its arguments, or the requested backend cannot."""


class BusyError(SpeclmError, RuntimeError):
    """A model or a proposer is in use by another generation."""


class ServerError(SpeclmError, RuntimeError):
    """A server cannot be reached, refuses all requests, or fails again and again."""


class PatchError(SpeclmError, RuntimeError):
    """A base is already patched, or its patch is not the one to be undone."""


class NumericalError(SpeclmError, ArithmeticError):
    """The target's logits, or a training loss, are not numbers."""


class UnsupportedModelError(SpeclmError, TypeError):
    """The object or checkpoint is not a decoder-only causal language model."""


class CheckpointError(SpeclmError, ValueError):
    """A file of weights is damaged, incomplete or of another kind than expected."""


class SaveError(SpeclmError, OSError):
    """Files cannot be written, such as on a full disk."""


class UploadError(SpeclmError, OSError):
    """Files cannot be uploaded to the hub."""


class FeatureError(SpeclmError, ValueError):
    """Cached features of a training belong to another one, are damaged or cannot be written."""


class MissingAssetError(SpeclmError, FileNotFoundError):
    """A file of the installed package is missing."""


class EngineError(SpeclmError, RuntimeError):
    """A stage cannot be compiled, recorded or run by an engine."""


class MeasurementError(SpeclmError, RuntimeError):
    """A measurement cannot be recorded, because it does not measure what it claims."""
