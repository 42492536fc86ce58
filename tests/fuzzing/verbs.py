"""What a case does with a folder: everything that speclm offers for folders of strangers."""

from collections.abc import Callable
from pathlib import Path

from speclm.errors import SpeclmError
from speclm.kernels.launch_table import read_table
from speclm.methods.block.checkpoint import build_block, read_block
from speclm.methods.eagle.checkpoint import read_eagle
from speclm.methods.eagle.network import build_eagle
from speclm.methods.finding import find_heads
from speclm.methods.medusa.checkpoint import read_medusa
from speclm.methods.mtp.checkpoint_writing import read_layers
from speclm.methods.recycling.checkpoint import read_memory
from speclm.model.call import read_tree
from speclm.model.exporting import convert_heads, format_names
from speclm.model.publishing import prepare_publication
from speclm.training.checkpoints import require_state
from speclm.training.feature_cache import FeatureManifest
from speclm.training.history import read_history
from tests.fuzzing.exported import FINGERPRINT, MEMORY, base_of

READERS = {
    "medusa": read_medusa,
    "eagle": lambda folder: build_eagle(read_eagle(folder)),
    "block": lambda folder: build_block(read_block(folder)),
    "mtp": read_layers,
}


def read_folder(place: Path) -> None:
    """Do what loading does before it needs a base."""
    source = find_heads(str(place))
    reader = READERS.get(source.method.name)
    if reader is not None:
        reader(place)


def load_folder(place: Path) -> None:
    """Load heads, or a draft model, next to a base."""
    source = find_heads(str(place))
    source.method.load(source, base_of(source.method.name))


def converting(rank: int) -> Callable[[Path], None]:
    """Return the verb that converts heads to the format of a rank among those of their method."""

    def convert_folder(place: Path) -> None:
        names = format_names().get(find_heads(str(place)).method.name, ["speclm"])
        out = place.parent / f"{place.name}.converted"
        convert_heads(place, out, to=names[rank % len(names)])

    return convert_folder


def publish_folder(place: Path) -> None:
    """Collect what would be uploaded."""
    prepare_publication(place, "org/heads", base="org/base")


HEADS = (*(read_folder, load_folder, publish_folder) * 3, *map(converting, range(9)))


def read_memory_file(place: Path) -> None:
    """Read a memory of candidates."""
    read_memory(place / MEMORY, vocab_size=9, fingerprint=FINGERPRINT, max_pairs=99)


def read_small_files(place: Path) -> None:
    """Read all small files, whichever is damaged."""
    refusals = []
    for read in (
        read_history,
        require_state,
        FeatureManifest.read,
        lambda folder: read_tree(folder / "tree.json"),
        lambda folder: read_table(str(folder / "table.json")),
    ):
        try:
            read(place)
        except SpeclmError as error:
            refusals.append(error)
    if refusals:
        raise refusals[0]


VERBS: dict[str, tuple[Callable[[Path], None], ...]] = {
    "memory": (read_memory_file,),
    "small files": (read_small_files,),
    "draft model": (load_folder,),
    "assistant": (load_folder,),
}
"""Verbs of layouts that are no heads."""
