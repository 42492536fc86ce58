"""Record, for each family, what the self-check decides and whether tokens are regular generation's.

The families are those of ``tests/families``, tiny and random; ``--all`` adds every other causal
language model of the installed Transformers, with a config that nobody looked at. Rows of the same
Transformers version are replaced, so that the file has one for each family and version.

    PYTHONPATH=. python benchmarks/decode/families.py --all
"""

import argparse
import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is loaded

import torch
import transformers
from transformers import AutoConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from benchmarks.report import markers
from speclm import SpecModel
from speclm.errors import UnsupportedModelError
from speclm.files.json_lines import parse_json_lines
from tests.families import FAMILIES, build_type, shared_family
from tests.families.cells import CELLS, compare, plain
from tests.families.family import EXPERTS, LATENT
from tests.models import SHAPE, WINDOW, randomise

OUT = markers.ROOT / "benchmarks" / "results" / "families.jsonl"
MAX_PARAMETERS = 3e7
SIZES: dict[str, object] = {
    **SHAPE,
    **EXPERTS,
    "hidden_size": 48,
    "num_hidden_layers": 4,
    "head_dim": 12,
    "sliding_window": WINDOW,
    "is_decoder": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""What every type is tried with, as far as its config knows it."""

Row = dict[str, Any]


def measure(model: PreTrainedModel) -> Row:
    """Return the verdict on a model, and what became of each cell."""
    spec = SpecModel(model, None)
    check = spec.self_check
    row: Row = {"backend": check.verification.value, "reason": check.reason}
    row["error"] = check.error if check.error < float("inf") else None  # JSON has no infinity
    row["cells"] = {}
    for cell in CELLS:
        compared = compare(spec, cell, reference=plain(model, cell))
        row["cells"][cell] = {
            "identical": compared.is_identical,
            "forwards": compared.num_forwards if not compared.stats.fallbacks else None,
        }
    return row


def table_rows() -> Iterator[Row]:
    for name, family in FAMILIES.items():
        about = {"family": name, "kind": "table", "examples": family.examples}
        yield {**about, **measure(shared_family(name))}


def survey_rows() -> Iterator[Row]:
    known = {family.model_type for family in FAMILIES.values()}
    for model_type in sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - known):
        row = {"family": model_type, "kind": "survey"}
        try:
            row |= measure(survey_model(model_type))
        except Exception as failure:  # noqa: BLE001 - of configs, models and regular generation
            row |= {"backend": None, "reason": f"{type(failure).__name__}: {failure}"[:200]}
        yield row


def survey_model(model_type: str) -> PreTrainedModel:
    """Return a model of a type that has a size for everything, small or not.

    Raises:
        UnsupportedModelError: If it is too large to be tried.
    """
    sizes = SIZES
    if hasattr(AutoConfig.for_model(model_type), "qk_rope_head_dim"):
        sizes = {**SIZES, **LATENT, "head_dim": LATENT["qk_rope_head_dim"]}
    with torch.device("meta"):
        num_parameters = build_type(model_type, {}, sizes=sizes).num_parameters()
    if num_parameters > MAX_PARAMETERS:
        raise UnsupportedModelError(f"{num_parameters / 1e6:.0f} million parameters, too many")
    return randomise(build_type(model_type, {}, sizes=sizes))


def write(path: Path, rows: list[Row], *, version: str) -> None:
    """Put rows in the place of those of the same version and kinds."""
    kinds = {row["kind"] for row in rows}
    old = parse_json_lines(path) if path.exists() else []
    kept = [row for row in old if row["transformers"] != version or row["kind"] not in kinds]
    rows = [*kept, *({"transformers": version, **row} for row in rows)]
    rows.sort(key=lambda row: (row["kind"] == "survey", row["transformers"]))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="survey every other causal LM as well")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args(arguments)
    os.environ["SPECLM_CACHE"] = ""  # every model is checked anew
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    logging.getLogger("speclm").setLevel(logging.ERROR)  # verdicts are printed below
    rows = []
    for row in chain(table_rows(), survey_rows() if options.all else ()):
        rows.append(row)
        wrong = [name for name, cell in row.get("cells", {}).items() if not cell["identical"]]
        note = f"DIFFERS in {', '.join(wrong)}" if wrong else ""
        print(f"{row['family']:24} {row['backend'] or '-':16} {row['reason'][:90]} {note}")
    write(options.out, rows, version=transformers.__version__)
    return int(any(not cell["identical"] for row in rows for cell in row.get("cells", {}).values()))


if __name__ == "__main__":
    sys.exit(main())
