"""Registry of drafting methods: how each is recognised, loaded, described, saved and trained.

Imports no PyTorch, so the command line can list methods and their training options quickly.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from typing_extensions import override

from speclm.config import require_options
from speclm.errors import OptionError, shown
from speclm.files.hub import commit_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainingArguments

    from speclm.cards import HeadsCard
    from speclm.drafting.formats import CheckpointFormat
    from speclm.drafting.heads_folder import Destination
    from speclm.drafting.interface import Proposer
    from speclm.files.weights import WeightFiles
    from speclm.training.heads_trainer import HeadsTrainer

ProposerType = TypeVar("ProposerType", bound=type)


class Recipe(ABC):
    """A training of heads: a command of ``speclm train``.

    Attributes:
        name: Name of the command.
        summary: Help line of the command.
        trains_heads_only: Whether it reads nothing of the base but hidden states, which can then be
            cached.
        options: Frozen dataclass of its options; fields are ``Annotated[type, help]`` with
            defaults, and bad values raise an `OptionError`.
        defaults: `TrainingArguments` that differ from those of `speclm.training.arguments`.
    """

    name: str
    summary: str
    trains_heads_only: ClassVar[bool] = True
    options: type
    defaults: ClassVar[Mapping[str, Any]] = {}

    @abstractmethod
    def trainer(
        self,
        base: "PreTrainedModel",
        args: "TrainingArguments",
        *,
        options: Any,
        train_dataset: Any,
        eval_dataset: Any = None,
    ) -> "HeadsTrainer":
        """Return a trainer of new or loaded heads, seeded with ``args.seed``."""


@dataclass(frozen=True, slots=True, eq=False)
class HeadsSource:
    """A recognised `heads` argument.

    Args:
        method: Method that loads it.
        given: Name, folder, hub id or object, as given.
        folder: Folder of the files, downloaded if necessary; None without files.
        hub: Options for the hub.
        options: All other options.
    """

    method: "Method"
    given: object
    folder: Path | None = None
    hub: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def commit(self) -> str | None:
        """Commit on the hub that the files are of; None for a folder of one's own."""
        return None if self.folder is None else commit_of(self.folder)


class Method(ABC):
    """A drafting method: recognises, loads, describes, saves and trains its proposers.

    Attributes:
        name: Name in the registry.
        summary: What it drafts with, in one line.
        aliases: Other names of its heads.
        is_named: Whether ``heads=name`` makes a proposer without files.
        reads_base_files: Whether it then reads files of the base, to which the base's options for
            the hub apply.
        hints: Patterns of small files, next to configs, by which it recognises a repository.
        extras: Patterns of small files that may belong to heads, next to config and weights.
        stores_trees: Whether the config of its heads can hold a static tree.
        recipes: How its heads are trained.
    """

    name: str
    summary: str
    aliases: ClassVar[tuple[str, ...]] = ()
    is_named: ClassVar[bool] = False
    reads_base_files: ClassVar[bool] = False
    hints: ClassVar[tuple[str, ...]] = ()
    extras: ClassVar[tuple[str, ...]] = ()
    stores_trees: ClassVar[bool] = False
    recipes: ClassVar[tuple[Recipe, ...]] = ()

    def takes(self, heads: object) -> bool:  # noqa: ARG002
        """Return whether this method drafts with an object, such as a loaded model."""
        return False

    def find_weights(self, folder: Path) -> "WeightFiles | None":  # noqa: ARG002
        """Return the weight files of a folder if their keys are those of this method's heads.

        Raises:
            CheckpointError: If a file that has to be opened cannot be read.
        """
        return None

    def is_declared(self, folder: Path) -> bool:  # noqa: ARG002
        """Return whether a folder's config declares heads of this method, even damaged ones."""
        return False

    def is_likely(self, folder: Path) -> bool:  # noqa: ARG002
        """Return whether a repository may hold such heads, from its configs and `hints` only."""
        return False

    @abstractmethod
    def load(self, source: HeadsSource, target: "PreTrainedModel") -> "Proposer":
        """Return the proposer for a target.

        Raises:
            OptionError: If an option is unknown; see `require_options`.
        """

    @abstractmethod
    def owns(self, proposer: "Proposer") -> bool:
        """Return whether a proposer belongs to this method."""

    def describe(self, proposer: "Proposer") -> str:
        """Return one line about a proposer for reports."""
        return proposer.describe()

    def require_writable(self, folder: Path) -> None:  # noqa: B027 - most have no files
        """Check that heads can be written into a folder without destroying anything.

        Raises:
            CheckpointError: If it is a file, or holds another model.
        """

    def save(self, proposer: "Proposer", destination: "Destination") -> None:
        """Write heads and a model card, as `load` reads them.

        Raises:
            OptionError: If the proposer has no heads.
        """
        del destination
        raise no_heads(proposer)

    def checkpoint(self, proposer: "Proposer", destination: "Destination") -> Any:
        """Return heads as a checkpoint that shares their memory, for the formats of this method.

        Raises:
            OptionError: If the proposer has no heads.
        """
        del destination
        raise no_heads(proposer)

    def formats(self) -> "tuple[CheckpointFormat[Any], ...]":
        """Return the checkpoint formats of this method's heads, that of `save` first."""
        return ()

    def card(self, folder: Path) -> "HeadsCard":
        """Return the card of the heads in a folder, which are read completely; see `save`."""
        raise OptionError(
            f"{folder}: found no heads, expected those of a method that saves them; train some "
            "with speclm train, or name another folder"
        )

    def companions(self, folder: Path) -> list[Path]:  # noqa: ARG002
        """Return the files of a folder that belong to it besides config, weights and card."""
        return []


class ProposerMethod(Method):
    """A proposer class that ``heads=name`` builds from its options.

    If its first parameter is named `target`, it receives the target.
    """

    is_named = True

    def __init__(
        self, name: str, find_type: "Callable[[], type[Proposer]]", *, summary: str
    ) -> None:
        self.name, self.summary, self._find_type = name, summary, find_type

    @override
    def load(self, source: HeadsSource, target: "PreTrainedModel") -> "Proposer":
        proposer_type, options = self._find_type(), dict(source.options)
        parameters = dict(inspect.signature(proposer_type).parameters)
        targets: tuple[Any, ...] = () if parameters.pop("target", None) is None else (target,)
        if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
            require_options(options, parameters, owner=f"proposer {self.name!r}")
        try:
            return proposer_type(*targets, **options)
        except TypeError as error:
            raise OptionError(
                f"proposer {self.name!r} cannot be built with {sorted(options)!r} ({error}); see "
                f"help({proposer_type.__name__})"
            ) from error

    @override
    def owns(self, proposer: "Proposer") -> bool:
        return isinstance(proposer, self._find_type())


def _lazily(folder: str, name: str) -> "Callable[[], type[Proposer]]":
    module = f"speclm.methods.{folder}.proposer"
    return lambda: getattr(import_module(module), name)


@cache
def _built_in() -> tuple[Method, ...]:
    from speclm.methods.block.method import BlockMethod
    from speclm.methods.draft_model.method import DraftModelMethod
    from speclm.methods.eagle.method import EagleMethod
    from speclm.methods.gemma_assistant.method import GemmaAssistantMethod
    from speclm.methods.medusa.method import MedusaMethod
    from speclm.methods.mtp.method import MtpMethod

    joined = "n-grams joined with the target's remembered candidates; has no weights"
    remembered = "what the target thought likely after the same tokens before; has no weights"
    copies = "copies what followed the same words in prompt or output; has no weights"
    return (
        ProposerMethod("lookup", _lazily("lookup", "LookupProposer"), summary=joined),
        ProposerMethod("ngram", _lazily("ngram", "NgramProposer"), summary=copies),
        ProposerMethod("recycling", _lazily("recycling", "RecyclingProposer"), summary=remembered),
        MtpMethod(),
        MedusaMethod(),
        BlockMethod(),
        EagleMethod(),
        GemmaAssistantMethod(),  # its models are also what a draft model may be
        DraftModelMethod(),
    )


_ADDED: dict[str, Method] = {}


def register_method(method: Method) -> None:
    """Make a method available; a method of the same name is replaced.

    Raises:
        OptionError: If it is no `Method`, or has no name.
    """
    if not isinstance(getattr(method, "name", None), str) or not isinstance(method, Method):
        raise OptionError(f"method is {shown(method)}, expected a Method with a name; pass one")
    _ADDED[method.name] = method


def registered_methods() -> dict[str, Method]:
    """Return all methods by name, in the order in which they are tried."""
    return {method.name: method for method in _built_in()} | _ADDED


def register_proposer(name: str) -> Callable[[ProposerType], ProposerType]:
    """Make a proposer class available as ``heads=name``.

    Registering a name again replaces the class, so that a notebook cell can be run twice.

    Raises:
        OptionError: If the class is no `Proposer`, or the name that of a method with files.
    """
    if not isinstance(name, str):
        raise OptionError(f"proposer name is {shown(name)}, expected a string; pass one")
    known = registered_methods().get(name)
    if known is not None and not known.is_named:
        raise OptionError(f"{name!r} is a method that loads files; choose another name")

    def register(proposer_type: ProposerType) -> ProposerType:
        from speclm.drafting.interface import Proposer

        if Proposer not in getattr(proposer_type, "__mro__", ()):
            raise OptionError(
                f"{name!r} is {shown(proposer_type)}, expected a subclass of Proposer; pass one"
            )
        summary = (inspect.getdoc(proposer_type) or proposer_type.__name__).splitlines()[0]
        register_method(ProposerMethod(name, lambda: proposer_type, summary=summary))
        return proposer_type

    return register


def heads_names() -> list[str]:
    """Return the names that `heads` may be, sorted."""
    return sorted(name for name, method in registered_methods().items() if method.is_named)


def reads_base_files(heads: object, options: object) -> bool:
    """Return whether a `heads` argument names a method that reads the base's own files.

    Args:
        heads: The argument.
        options: Its options; ``heads_path`` names other files.
    """
    if isinstance(options, Mapping) and "heads_path" in options:
        return False
    method = registered_methods().get(heads) if isinstance(heads, str) else None
    return method is not None and method.is_named and method.reads_base_files


def method_of(proposer: "Proposer") -> Method | None:
    """Return the method of a proposer; the newest if several claim it."""
    methods = reversed(registered_methods().values())
    return next((method for method in methods if method.owns(proposer)), None)


def no_heads(proposer: object) -> OptionError:
    """Return the error for saving a proposer that has no heads."""
    found = "None" if proposer is None else type(proposer).__name__
    return OptionError(
        f"proposer is {found}, which has no heads to save; a draft model is saved with its own "
        "save_pretrained"
    )
