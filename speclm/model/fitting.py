"""Whether a proposer that the caller built fits the base that it is used with."""

from collections.abc import Iterator
from contextlib import contextmanager

from speclm.drafting.interface import Proposer
from speclm.errors import OptionError, VocabularyMismatchError
from speclm.generation.regular import NeedsRegularGeneration
from speclm.target import TargetView, exclusive

_REMEDY = "build it with target=base, or wrap the base that it was built for"


def require_fits(proposer: Proposer, target: TargetView) -> None:
    """Check that a target is what a proposer and its parts need.

    Raises:
        VocabularyMismatchError: If one was built for another vocabulary.
        OptionError: If one was built for another width, or computes with another model.
    """
    for part in _every_part(proposer):
        needs, name = part.needs, type(part).__name__
        if needs.vocab_size not in {None, target.vocab_size}:
            raise VocabularyMismatchError(
                f"{name} was built for a vocabulary of {needs.vocab_size}, the base {target.name} "
                f"has one of {target.vocab_size}; {_REMEDY}"
            )
        if needs.hidden_size not in {None, target.hidden_size}:
            raise OptionError(
                f"{name} was built for hidden states {needs.hidden_size} wide, those of the base "
                f"{target.name} are {target.hidden_size} wide; {_REMEDY}"
            )
        if needs.model is not None and needs.model is not target.model:
            found = TargetView(needs.model).name
            raise OptionError(
                f"{name} uses the output matrix of another model object, {found}, expected that "
                f"of the base {target.name}; {_REMEDY}"
            )


def require_still_fits(proposer: Proposer | None, target: TargetView) -> None:
    """Check before a call that nothing was changed since the proposer was checked.

    Embeddings that were resized are an example.

    Raises:
        NeedsRegularGeneration: If it does not fit any more; the message says why.
    """
    if proposer is None:
        return
    try:
        require_fits(proposer, target)
    except (VocabularyMismatchError, OptionError) as error:
        raise NeedsRegularGeneration(str(error)) from error


@contextmanager
def claimed(target: TargetView, proposer: Proposer | None, *, waits: bool = True) -> Iterator[None]:
    """Have a target, a proposer and its parts for one generation, all of them at once.

    Args:
        target: The target.
        proposer: Guesses tokens for it.
        waits: Whether to wait while another thread has one of them.

    Raises:
        NestedError: If the call comes from inside a generation and cannot wait.
        BusyError: If another thread has one of them and `waits` is False.
    """
    parts = [] if proposer is None else list(_every_part(proposer))
    wanted = [(target.model, target.name), *((part, type(part).__name__) for part in parts)]
    with exclusive(wanted, waits=waits):
        yield


def _every_part(proposer: Proposer) -> Iterator[Proposer]:
    yield proposer
    for part in proposer.parts:
        yield from _every_part(part)
