"""Measure regular generation, Transformers' own speculation and ours on the bundled prompts.

Every run is paired with regular generation of the same prompts and seed, in alternating order. What
the file of records already holds for this commit and these settings is not measured again.

    python benchmarks/decode/decode.py --set both --n 100 --settings greedy,t0.7,t1.0 --batch 1,4
    python benchmarks/decode/decode.py --shape 1b --dtype bfloat16 --methods plain,ngram,draft
    python benchmarks/decode/decode.py --methods eagle3 --batch 1,4,16 --tree auto
    python benchmarks/decode/decode.py --methods eagle3 --batch 1 --engine compile
"""

import argparse
import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything needed is bundled

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging
from typing_extensions import override

from benchmarks.inflation.inflate import bytes_read, inflate_llama, inflate_medusa
from benchmarks.inflation.inflate_block import inflate_block
from benchmarks.inflation.inflate_eagle import inflate_eagle
from benchmarks.inflation.shapes import SHAPES, InflatedShape, draft_shape
from speclm.acceptance import Accepted
from speclm.bench import (
    SETTINGS,
    Call,
    Cell,
    Decoder,
    Measured,
    assisted_decoder,
    make_calls,
    measure_grid,
    plain_decoder,
    prompt_lookup_decoder,
    setting_options,
    speculative_decoder,
)
from speclm.demo.bundle import assets, load_prompts
from speclm.drafting.combined import CombinedProposer
from speclm.drafting.interface import Draft, Prefill, Proposer
from speclm.engines import Engine
from speclm.methods.block.proposer import BlockProposer
from speclm.methods.eagle.proposer import EagleProposer
from speclm.methods.lookup.proposer import LookupProposer
from speclm.methods.medusa.proposer import MedusaProposer
from speclm.methods.ngram.proposer import NgramProposer
from speclm.model.heads import load_proposer
from speclm.sampling import PositionNoise
from speclm.tree import chain

MAX_NEW_TOKENS = {"sql": 128, "gsm8k": 256}
METHODS = (
    "plain",
    "none",
    "useless",
    "prompt_lookup",
    "assisted",
    "ngram",
    "recycling",
    "lookup",
    "lookup call",
    "draft",
    "medusa",
    "ngram+medusa",
    "eagle",
    "eagle3",
    "lookup+eagle3",
    "block",
)
DRAFT_METHODS = frozenset({"assisted", "draft"})
MEDUSA_METHODS = frozenset({"medusa", "ngram+medusa"})
EAGLE_METHODS = {"eagle": "eagle", "eagle3": "eagle3", "lookup+eagle3": "eagle3"}
"""Folder of the heads of each."""


class UselessProposer(Proposer):
    """Draft eight padding tokens, which are always rejected: the cost of useless drafts."""

    @override
    def begin(self, prompt: Prefill) -> None:
        """Needs no state."""

    @override
    def propose(self, roots: Int[Tensor, " batch"], *, noise: PositionNoise | None) -> Draft:
        tokens = torch.zeros(len(roots), 9, dtype=torch.long, device=roots.device)
        return Draft(tokens=tokens, topology=chain(8, device=roots.device))

    @override
    def commit(self, accepted: Accepted) -> None:
        """Needs no state."""


@dataclass(frozen=True, slots=True)
class Drafters:
    """What several methods share; None where no method needs it."""

    draft: PreTrainedModel | None
    medusa: MedusaProposer | None
    eagle: Mapping[str, EagleProposer] = field(default_factory=dict)
    block: BlockProposer | None = None


def load_model(name: str, *, dtype: torch.dtype, device: str) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(assets()[name], dtype=dtype)
    return model.to(device)


def load_drafters(
    names: Sequence[str],
    base: PreTrainedModel,
    *,
    shape: InflatedShape | None = None,
    folder: Path | None = None,
) -> Drafters:
    """Load what the named methods draft with, inflated if the base is.

    EAGLE and block heads come from folders of the methods' names, in `folder` or among the bundled
    assets.
    """
    small = base
    if shape is not None:
        small = load_model("base", dtype=base.dtype, device=str(base.device))
    draft = medusa = None
    if DRAFT_METHODS & set(names):
        draft = load_model("draft", dtype=base.dtype, device=str(base.device))
        if shape is not None:
            draft = inflate_llama(draft, draft_shape(draft, small, shape), seed=1)
    if MEDUSA_METHODS & set(names):
        medusa = load_medusa(small)
        if shape is not None:
            heads = inflate_medusa(medusa.heads, shape, seed=2)
            medusa = MedusaProposer(heads, target=base, tree=medusa.config.paths)
    eagle = {}
    for name in sorted({EAGLE_METHODS[name] for name in names if name in EAGLE_METHODS}):
        eagle[name] = load_eagle(name, small, folder=folder)
        if shape is not None:
            mine = inflate_eagle(eagle[name].heads, shape, base=InflatedShape.of(small), seed=3)
            eagle[name] = EagleProposer(mine, target=base)
    block = None
    if "block" in names:
        block = load_block(small, folder=folder)
        if shape is not None:
            wide = inflate_block(block.heads, shape, base=InflatedShape.of(small), seed=4)
            block = BlockProposer(wide, target=base)
    return Drafters(draft, medusa, eagle, block)


def load_block(base: PreTrainedModel, *, folder: Path | None = None) -> BlockProposer:
    """Load block heads, from the folder `block` in a folder or the bundled ones."""
    path = assets()["block"] if folder is None else folder / "block"
    proposer = load_proposer(path, base, heads_kwargs={}, num_draft_tokens=None)
    assert isinstance(proposer, BlockProposer)
    return proposer


def load_eagle(name: str, base: PreTrainedModel, *, folder: Path | None = None) -> EagleProposer:
    """Load EAGLE heads, from a folder of that name or the bundled ones."""
    path = assets()[name] if folder is None else folder / name
    proposer = load_proposer(path, base, heads_kwargs={}, num_draft_tokens=None)
    assert isinstance(proposer, EagleProposer)
    return proposer


def load_medusa(base: PreTrainedModel) -> MedusaProposer:
    proposer = load_proposer(assets()["medusa"], base, heads_kwargs={}, num_draft_tokens=None)
    assert isinstance(proposer, MedusaProposer)
    return proposer


def build_methods(
    names: Sequence[str],
    base: PreTrainedModel,
    *,
    lookup_tokens: int,
    drafters: Drafters | None = None,
    tree: str | None = None,
    engine: str | Engine = "auto",
) -> list[Decoder]:
    """Return the named methods; drafters that are not given are loaded.

    `tree` and `engine` are passed to our own `generate`.
    """
    loaded = drafters or load_drafters(names, base)

    def build(name: str) -> Decoder:
        if name == "plain":
            return plain_decoder(base)
        if name == "prompt_lookup":
            return prompt_lookup_decoder(base, num_tokens=lookup_tokens)
        if name == "assisted":
            assert loaded.draft is not None
            return assisted_decoder(base, loaded.draft)
        heads: dict[str, Any] = {
            "none": None,
            "useless": UselessProposer(),
            "ngram": "ngram",
            "recycling": "recycling",
            "lookup": "lookup",
            "draft": loaded.draft,
            "medusa": loaded.medusa,
            **loaded.eagle,
            "block": loaded.block,
        }
        if name == "ngram+medusa":
            assert loaded.medusa is not None
            heads[name] = CombinedProposer([NgramProposer(), loaded.medusa])
        if name == "lookup+eagle3":
            heads[name] = CombinedProposer([LookupProposer(base), loaded.eagle["eagle3"]])
        if name == "lookup call":
            heads[name] = LookupProposer(base, memory="call")
        proposer = load_proposer(heads[name], base, heads_kwargs={}, num_draft_tokens=None)
        return speculative_decoder(name, base, proposer, tree=tree, engine=engine)

    return [build(name) for name in names]


def with_shape(
    cell: Cell, method: Decoder, *, shape: str, base: PreTrainedModel, drafters: Drafters
) -> Cell:
    """Return the cell with settings that say that models are inflated, and what the method reads.

    ``bytes_read`` holds the bytes of weights that one forward of each module reads. In a round the
    base, Medusa and block heads run one forward, a draft model and EAGLE heads one for each level
    of the draft.
    """
    read = {"base": bytes_read(base, base=base)}
    if method.name in DRAFT_METHODS and drafters.draft is not None:
        read["draft"] = bytes_read(drafters.draft, base=base)
    if method.name in MEDUSA_METHODS and drafters.medusa is not None:
        used = drafters.medusa.config.depth
        read["medusa"] = bytes_read(drafters.medusa.heads, base=base, num_heads=used)
    if method.name in EAGLE_METHODS:
        heads = EAGLE_METHODS[method.name]
        read[heads] = bytes_read(drafters.eagle[heads].heads, base=base)
    if method.name == "block" and drafters.block is not None:
        read["block"] = bytes_read(drafters.block.heads, base=base)
    added = {"shape": shape, "is_inflated": True, "bytes_read": read}
    return replace(cell, settings={**cell.settings, **added})


def build_cells(
    base: PreTrainedModel,
    *,
    sets: Sequence[str],
    num_prompts: int,
    settings: Sequence[str],
    batches: Sequence[int],
    tune: bool = False,
    max_new_tokens: int | None = None,
) -> list[Cell]:
    """Return one cell for each set, setting and batch size."""
    tokenizer = AutoTokenizer.from_pretrained(assets()["base"])
    cells = []
    for name in sets:
        prompts = f"{name}_{'tune' if tune else 'dev'}"
        conversations = load_prompts(prompts, limit=num_prompts)
        length = max_new_tokens or MAX_NEW_TOKENS[name]
        for setting in settings:
            options = {**setting_options(setting), "max_new_tokens": length}
            for batch in batches:
                calls = make_calls(conversations, base, tokenizer, options=options, batch=batch)
                cells.append(
                    Cell(calls, _cell_settings(base, prompts, setting, batch, calls, length))
                )
    return cells


def _cell_settings(
    base: PreTrainedModel,
    prompts: str,
    setting: str,
    batch: int,
    calls: Sequence[Call],
    length: int,
) -> dict[str, Any]:
    return {
        "prompts": prompts,
        "num_prompts": sum(call.input_ids.shape[0] for call in calls),
        "setting": setting,
        "options": dict(calls[0].options),
        "batch": batch,
        "max_new_tokens": length,
        "dtype": str(base.dtype).removeprefix("torch."),
        "device": base.device.type,
        "num_threads": torch.get_num_threads(),
    }


def describe(measured: Measured) -> str:
    """Return one line on a measurement."""
    settings, record = measured.cell.settings, measured.record
    tau = "" if record.tau is None else f"tau {record.tau:.2f}"
    same = f"identical {record.num_identical}/{record.n}"
    if record.divergences and measured.comparison.is_honest:
        same += " (rounding)"
    return (
        f"{settings['prompts']:11s} {settings['dtype']:8s} {settings['setting']:6s} "
        f"batch {settings['batch']} {measured.comparison.method:13s} "
        f"{record.tokens_per_second or 0:7.0f} tokens/s, "
        f"plain {record.plain_tokens_per_second or 0:6.0f}, "
        f"ratio {record.median:.2f} [{record.lower_quartile:.2f}, {record.upper_quartile:.2f}] "
        f"{tau:9s} {same}"
    )


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--set", choices=("sql", "gsm8k", "both"), default="both")
    parser.add_argument("--n", type=int, default=100, help="prompts of each set")
    parser.add_argument("--settings", type=_names(tuple(SETTINGS)), default=[*SETTINGS])
    parser.add_argument("--batch", type=_numbers, default=[1, 4])
    parser.add_argument("--methods", type=_names(METHODS), default=[*METHODS])
    parser.add_argument("--shape", choices=sorted(SHAPES), help="inflate all models, see the docs")
    parser.add_argument(
        "--heads", type=Path, help="folder of folders eagle, eagle3 and block of heads"
    )
    parser.add_argument("--tree", help="passed to our own generate, such as auto")
    parser.add_argument("--engine", default="auto", help="passed to our own generate")
    parser.add_argument("--lookup-tokens", type=int, default=10, help="prompt_lookup_num_tokens")
    parser.add_argument("--max-new-tokens", type=int, help="instead of 128 and 256")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/decode.jsonl"))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tune", action="store_true", help="use the tuning prompts")
    return parser.parse_args(arguments)


def _names(known: tuple[str, ...]) -> Any:
    def parse(text: str) -> list[str]:
        names = text.split(",")
        unknown = sorted(set(names) - set(known))
        if unknown:
            raise argparse.ArgumentTypeError(f"{unknown} are not among {list(known)}")
        return names

    return parse


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def main() -> None:
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    logging.disable_progress_bar()
    base = load_model("base", dtype=getattr(torch, options.dtype), device=options.device)
    shape = SHAPES[options.shape] if options.shape else None
    if shape is not None:
        base = inflate_llama(base, shape)
    drafters = load_drafters(options.methods, base, shape=shape, folder=options.heads)
    methods = build_methods(
        options.methods,
        base,
        lookup_tokens=options.lookup_tokens,
        drafters=drafters,
        tree=options.tree,
        engine=options.engine,
    )
    cells = build_cells(
        base,
        sets=("sql", "gsm8k") if options.set == "both" else (options.set,),
        num_prompts=options.n,
        settings=options.settings,
        batches=options.batch,
        tune=options.tune,
        max_new_tokens=options.max_new_tokens,
    )
    for cell, method in itertools.product(cells, methods):
        chosen = {"tree": options.tree} if options.tree is not None else {}
        chosen |= {"engine": options.engine} if options.engine != "auto" else {}
        here = replace(cell, settings={**cell.settings, **chosen})
        if shape is not None:
            here = with_shape(here, method, shape=options.shape, base=base, drafters=drafters)
        for result in measure_grid(
            [here], [method], base=base, benchmark="decode", path=options.out
        ):
            print(describe(result), flush=True)


if __name__ == "__main__":
    main()
