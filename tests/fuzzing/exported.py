"""Tiny valid folders as `write_format` lays them out, and other files that speclm writes."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from transformers import PreTrainedModel

from speclm import SpecModel
from speclm.drafting.base_parts import BaseParts
from speclm.files.atomic import write_json
from speclm.kernels.launch_table import TABLE, write_table
from speclm.methods.recycling.checkpoint import StoredMemory, write_memory
from speclm.methods.registry import registered_methods
from speclm.model.exporting import find_format, format_names, write_format
from speclm.training.feature_cache import FeatureManifest
from speclm.training.history import HISTORY_NAME
from tests import block_tables, eagle_tables, models
from tests.fuzzing import layouts
from tests.methods.gemma_assistant import assistants
from tests.methods.mtp import mtp_bases

MEMORY = "memory.safetensors"
STATE = "trainer_state.json"
FINGERPRINT = "0" * 32
_MEDUSA_SIZES, _SIZES = (4, 9), (8, 20)  # hidden size and vocabulary of the tables
_MTP = mtp_bases.Row("qwen2", {"hidden_size": 8, "vocab_size": 20}, mtp_bases.QWEN)


@cache
def base_of(method: str, *, num_layers: int = 10) -> PreTrainedModel:
    """Return a base that heads of a method in the layouts fit."""
    if method == "gemma_assistant":
        return assistants.build_base()
    if method == "mtp":
        with TemporaryDirectory() as place:
            return mtp_bases.make_base(Path(place), _MTP).base
    hidden, vocab = _MEDUSA_SIZES if method == "medusa" else _SIZES
    return models.build_model(
        "llama",
        hidden_size=hidden,
        intermediate_size=8,
        vocab_size=vocab,
        head_dim=4,
        num_attention_heads=2,
        num_hidden_layers=36 if method == "block" else num_layers,
        tie_word_embeddings=False,
    )


def _mtp() -> layouts.Files:
    """Return MTP layers, as they are saved."""
    with TemporaryDirectory() as place:
        base = mtp_bases.make_base(Path(place, "base"), _MTP).base
        options = {"heads_path": Path(place, "base")}
        spec = SpecModel.from_pretrained(base, "mtp", heads_kwargs=options)
        spec.save_pretrained(Path(place, "heads"))
        return {path.name: path.read_bytes() for path in sorted(Path(place, "heads").iterdir())}


def _with_norms() -> layouts.Files:
    """Return EAGLE-3 heads of the Qwen family, which have norms and the whole vocabulary."""
    tables = eagle_tables
    table = {key: shape for key, shape in tables.EAGLE3.items() if key not in ("d2t", "t2d")}
    table |= {f"midlayer.self_attn.{part}_norm.weight": (4,) for part in "qk"}
    table["lm_head.weight"] = (20, 8)
    config = {k: v for k, v in tables.EAGLE3_CONFIG.items() if k != "draft_vocab_size"}
    return layouts.folder(tables, table, config)


_SOURCES: dict[tuple[str, str], Callable[[], layouts.Files]] = {
    ("eagle", "eagle"): layouts.eagle,
    ("eagle", "vllm-legacy"): layouts.eagle,
    ("eagle", "rtp-llm"): _with_norms,
    ("block", "dspark"): lambda: layouts.block("DeepSpec"),
}
"""What formats are made of that cannot hold the usual heads of their method."""

_USUAL: dict[str, Callable[[], layouts.Files]] = {
    "medusa": layouts.medusa,
    "eagle": lambda: layouts.eagle(3),
    "block": lambda: layouts.block(next(iter(block_tables.LAYOUTS))),
    "mtp": _mtp,
}


def exported(method: str, name: str) -> layouts.Files:
    """Return heads in a format of `format_names`, with their card and provenance."""
    found, base = registered_methods()[method], base_of(method)
    target = find_format(found, name)
    files = _SOURCES.get((method, name), _USUAL[method])()
    with TemporaryDirectory() as place:
        source, out, home = (Path(place, part) for part in ("source", "out", "base"))
        for folder in (source, home):
            folder.mkdir()
        for file, content in files.items():
            (source / file).write_bytes(content)
        base.save_pretrained(home)
        if method == "mtp":
            mtp_bases.make_base(home, _MTP)
        checkpoint = found.formats()[0].read(source)
        about = {"name": None, "format": found.formats()[0].name}
        parts = BaseParts.find(home)
        write_format(out, checkpoint, target, method=found, base=parts, source=about)
        return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


def memory() -> layouts.Files:
    """Return the file of a memory of candidates."""
    ids = np.array([[1, 2], [3, 0], [4, 5]], dtype=np.int32)
    stored = StoredMemory(
        tokens=np.array([0, 3, 8], dtype=np.int32),
        token_ids=ids,
        token_log_probs=np.full((3, 2), -1, dtype=np.float16),
        pairs=np.array([7, 30], dtype=np.int64),
        pair_ids=ids[:2],
        pair_log_probs=np.full((2, 2), -2, dtype=np.float16),
    )
    with TemporaryDirectory() as place:
        path = Path(place, MEMORY)
        write_memory(path, stored, vocab_size=9, fingerprint=FINGERPRINT)
        return {MEMORY: path.read_bytes()}


def small_files() -> layouts.Files:
    """Return the JSON that trainings, caches and searches leave."""
    names = ("recipe", "version", "weights", "base")
    history = {
        "kind": "speclm training",
        **dict.fromkeys(names, "eagle"),
        "options": {"num_steps": 3},
        "data": {"examples": 3, "sha256": "0" * 64},
        "arguments": {"learning_rate": 1e-3, "seed": 1},
        "steps": 10,
        "log": [{"step": 10, "loss": 2.5, "eval_loss": 2.0, "eval_head_1_top1": 0.5}],
    }
    state = {"global_step": 10, "best_model_checkpoint": None, "stateful_callbacks": {}}
    content = {"tree.json": {"tree": [[0], [0, 0], [1]]}, STATE: state, HISTORY_NAME: history}
    with TemporaryDirectory() as place:
        folder = Path(place)
        FeatureManifest(
            **dict.fromkeys(("base", "weights", "texts"), "0"),
            num_texts=3,
            num_tokens=9,
            layers=(1, 4),
            dtype="float16",
            width=8,
            shards=(2, 1),
        ).write(folder)
        write_table(folder / "table.json", {"sm_90": TABLE["interpreter"]})
        for name, value in content.items():
            write_json(folder / name, value)
        return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def draft_model() -> layouts.Files:
    """Return a language model, as Transformers writes it."""
    with TemporaryDirectory() as place:
        base_of("draft_model", num_layers=1).save_pretrained(place)
        return {path.name: path.read_bytes() for path in sorted(Path(place).iterdir())}


def assistant() -> layouts.Files:
    """Return an assistant of Gemma 4, as Transformers writes it."""
    with TemporaryDirectory() as place:
        assistants.build_assistant(has_clusters=True).save_pretrained(place)
        return {path.name: path.read_bytes() for path in sorted(Path(place).iterdir())}


EXPORTED: dict[str, Callable[[], layouts.Files]] = {
    f"{method} for {name}": lambda method=method, name=name: exported(method, name)
    for method, names in format_names().items()
    for name in names
}
OTHERS: dict[str, Callable[[], layouts.Files]] = {
    "memory": memory,
    "small files": small_files,
    "draft model": draft_model,
    "assistant": assistant,
}
ALL = {**layouts.LAYOUTS, **EXPORTED, **OTHERS}


@cache
def files_of(layout: str) -> layouts.Files:
    """Return the files of a layout, which nobody may change."""
    return ALL[layout]()
