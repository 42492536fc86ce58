"""Where the bundled models and prompts lie."""

from pathlib import Path

from speclm.errors import MissingAssetError

DATA = Path(__file__).parent / "data"
NAMES = ("base", "draft", "eagle", "eagle3", "medusa", "prompts")


def assets() -> dict[str, Path]:
    """Return the folders of the bundled assets by name.

    ``base`` and ``draft`` are model folders with tokenizer; ``medusa``, ``eagle`` and ``eagle3``
    hold Medusa, EAGLE-1 and EAGLE-3 heads for that base. Load the models with
    ``dtype=torch.float32``, because their files are bfloat16.
    ``prompts`` holds the conversations that [speclm.demo.load_prompts][] reads.

    Raises:
        MissingAssetError: An asset is not part of this installation.

    Example:
        >>> sorted(assets())
        ['base', 'draft', 'eagle', 'eagle3', 'medusa', 'prompts']
    """
    paths = {name: DATA / name for name in NAMES}
    missing = [name for name, path in paths.items() if not path.is_dir()]
    if missing:
        raise MissingAssetError(
            f"{DATA}: expected the demo assets {list(NAMES)}, found no {missing}; install speclm "
            "from its wheel or from a full checkout"
        )
    return paths
