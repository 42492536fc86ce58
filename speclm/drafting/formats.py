"""Checkpoint formats: how heads are laid out for other software, and who loads them."""

import json
import shlex
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any, ClassVar, Generic, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from speclm.cards import HeadsCard
from speclm.drafting.base_parts import BaseParts
from speclm.drafting.package import Package
from speclm.files.weights import WeightFiles

CheckpointT = TypeVar("CheckpointT")
NUM_PROBED = 8
"""Positions whose logits `CheckpointFormat.logits` returns."""

_SEED = 0  # of the inputs of `CheckpointFormat.logits`


def random_inputs(*shapes: tuple[int, ...]) -> list[Float[Tensor, "..."]]:
    """Return the same normal numbers of these shapes at every call, on the CPU."""
    generator = torch.Generator("cpu").manual_seed(_SEED)
    return [
        torch.randn(shape, dtype=torch.float32, device="cpu", generator=generator)
        for shape in shapes
    ]


@dataclass(frozen=True, slots=True)
class Engine:
    """Software that loads heads in a format.

    Args:
        name: Its name.
        versions: Versions that load the heads, as a phrase such as ``"0.33 and later"``.
        command: Shell command that serves base and heads; ``$base`` and ``$heads`` stand for
            their places, ``$heads_in_json`` for that of the heads within JSON in single quotes.
            Empty if the software has none.
        note: What a user has to know before the command works, in one sentence.
    """

    name: str
    versions: str
    command: str = ""
    note: str = ""

    def command_for(self, *, base: str, heads: str) -> str:
        """Return the command for a base and heads, quoted for the shell."""
        in_json = json.dumps(heads)[1:-1].replace("'", "'\\''")
        places = {"base": shlex.quote(base), "heads": shlex.quote(heads), "heads_in_json": in_json}
        return Template(self.command).substitute(places)


class CheckpointFormat(ABC, Generic[CheckpointT]):
    """A layout of heads on disk, for one method.

    Attributes:
        name: Name for ``speclm convert --to``; several methods may have a format of one name.
        title: Whose layout it is, in a few words.
    """

    name: ClassVar[str]
    title: ClassVar[str]

    @abstractmethod
    def detect(self, source: WeightFiles, config: Mapping[str, Any]) -> bool:
        """Return whether weights with these keys and this config.json are in this format.

        Args:
            source: Weight files whose keys are those of the method's heads.
            config: Content of config.json; empty without one.
        """

    @abstractmethod
    def read(self, folder: Path, **options: Any) -> CheckpointT:
        """Return the heads in a folder of this format; large tensors stay on the disk.

        Args:
            folder: The folder.
            **options: Options of the method for its files.

        Raises:
            OptionError: If the method has no such option.
            CheckpointError: If they are damaged, incomplete or of another method.
        """

    @abstractmethod
    def pack(self, checkpoint: CheckpointT, base: BaseParts | None) -> Package:
        """Return the files of heads in this format.

        Args:
            checkpoint: The heads.
            base: The model that they draft for, if it is known.

        Raises:
            CheckpointError: If the format cannot hold the heads, or needs the base; the message
                says what to do.
        """

    def is_of_whole_model(self, checkpoint: CheckpointT) -> bool:  # noqa: ARG002 - most are not
        """Return whether heads come from a model that was trained with them: it is their base."""
        return False

    @abstractmethod
    def engines(self, checkpoint: CheckpointT) -> tuple[Engine, ...]:
        """Return the software that loads these heads in this format, the usual one first."""

    @abstractmethod
    def logits(
        self,
        checkpoint: CheckpointT,
        *,
        embeddings: Float[Tensor, "vocab hidden"] | None,
        lm_weight: Float[Tensor, "vocab hidden"] | None,
    ) -> Float[Tensor, "*rows vocab"]:
        """Return the logits of some fixed random inputs in float32, to compare heads with others.

        Args:
            checkpoint: The heads.
            embeddings: The base's embeddings, for heads that share them; None for random ones.
            lm_weight: The base's output matrix, likewise.
        """

    @abstractmethod
    def card(self, checkpoint: CheckpointT) -> HeadsCard:
        """Return the model card of heads."""
