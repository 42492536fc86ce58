"""EAGLE heads in the layouts of other software."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from typing_extensions import override

from speclm.cards import HeadsCard
from speclm.drafting.base_parts import BaseParts
from speclm.drafting.formats import CheckpointFormat, Engine
from speclm.drafting.package import Package
from speclm.files.weights import WeightFiles
from speclm.methods.eagle.checkpoint import EagleCheckpoint, pack_eagle, read_eagle


class _EagleFormat(CheckpointFormat[EagleCheckpoint]):
    """What all formats of EAGLE heads share: they are read by `read_eagle`."""

    @override
    def read(self, folder: Path) -> EagleCheckpoint:
        return read_eagle(folder)

    @override
    def card(self, checkpoint: EagleCheckpoint) -> HeadsCard:
        from speclm.methods.eagle.method import eagle_card

        return eagle_card(checkpoint)


class _Own(_EagleFormat):
    name = "speclm"
    title = "speclm, which is that of SafeAILab's EAGLE, with the tree in config.json"

    @override
    def detect(self, source: WeightFiles, config: Mapping[str, Any]) -> bool:
        return True  # `read_eagle` reads every layout

    @override
    def pack(self, checkpoint: EagleCheckpoint, base: BaseParts | None) -> Package:
        return pack_eagle(checkpoint, num_target_layers=base.num_layers if base else None)

    @override
    def engines(self, checkpoint: EagleCheckpoint) -> tuple[Engine, ...]:
        return (Engine("speclm", "all", "speclm chat --base $base --heads $heads"),)


EAGLE_FORMATS = (_Own(),)
