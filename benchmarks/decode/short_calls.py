"""Measure calls of a few tokens in lm-eval, in a pipeline and by `generate` itself.

Each call of `SpecModel` is paired with the same call of the base, in alternating order. "First"
calls are the first ones of a new `SpecModel`, "later" ones share one. The ratio is the base's time
over ours, with all that lm-eval or the pipeline does around `generate`.

    python benchmarks/decode/short_calls.py --places lm_eval,generate --methods ngram
"""

import argparse
import itertools
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything needed is bundled

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
from transformers.utils import logging

from benchmarks.decode.decode import UselessProposer
from speclm import SpecModel
from speclm.bench import Spread, append_record, make_calls, setting_options
from speclm.bench.decoders import render_prompt
from speclm.bench.records import Record
from speclm.demo.bundle import assets, load_prompts

METHODS = ("none", "useless", "ngram", "draft", "medusa", "eagle", "eagle3")
PLACES = ("lm_eval", "pipeline", "generate", "stop_strings")
UNTIL = ["\n\n", "Question:"]
Run = Callable[[int], object]
"""Makes call number i and returns what it gave."""


def make_run(
    place: str, model: Any, tokenizer: Any, prompts: Sequence[str], *, batch: int, tokens: int
) -> Run:
    """Return a function that makes the calls of a place with a model, over prompts in turn."""
    groups = [prompts[first : first + batch] for first in range(0, len(prompts), batch)]
    if place == "lm_eval":
        lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch, device="cpu")
        options = {"until": UNTIL, "max_gen_toks": tokens, "do_sample": False}
        requests = [
            [Instance("generate_until", {}, (text, options), index) for index, text in group]
            for group in (list(enumerate(group)) for group in groups)
        ]
        return lambda index: lm.generate_until(requests[index % len(groups)], disable_tqdm=True)
    if place == "pipeline":
        pipe = pipeline("text-generation", model=model, tokenizer=tokenizer, batch_size=batch)
        options = {"do_sample": True, "temperature": 0.7, "max_new_tokens": tokens}
        return lambda index: pipe(list(groups[index % len(groups)]), **options)
    options = {**setting_options("greedy"), "max_new_tokens": tokens}
    if place == "stop_strings":
        options |= {"stop_strings": UNTIL, "tokenizer": tokenizer}
    calls = make_calls(prompts, model, tokenizer, options=options, batch=batch)
    return lambda index: model.generate(**calls[index % len(calls)].arguments).tolist()


def timed(run: Run, index: int) -> tuple[float, object]:
    torch.manual_seed(index)
    start = perf_counter()
    found = run(index)
    return perf_counter() - start, found


def pair(base_run: Run, spec_run: Run, index: int) -> tuple[float, float]:
    """Return the seconds of the base's call and of ours; their outputs have to be equal."""
    if index % 2:
        ours, found = timed(spec_run, index)
        theirs, wanted = timed(base_run, index)
    else:
        theirs, wanted = timed(base_run, index)
        ours, found = timed(spec_run, index)
    if found != wanted:
        raise SystemExit(f"call {index} differs: {wanted!r} and {found!r}")
    return theirs, ours


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/short_calls.jsonl"))
    parser.add_argument("--places", default=",".join(PLACES))
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--batch", default="1,4")
    parser.add_argument("--tokens", default="32")
    parser.add_argument("--calls", type=int, default=30, help="later calls")
    parser.add_argument("--first", type=int, default=10, help="first calls")
    parser.add_argument("--set", default="sql", choices=("sql", "gsm8k"))
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    base = AutoModelForCausalLM.from_pretrained(assets()["base"], dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(assets()["base"], padding_side="left")
    conversations = load_prompts(f"{options.set}_dev", limit=100)
    prompts = [render_prompt("a prompt", each, tokenizer) for each in conversations]
    cells = itertools.product(
        options.places.split(","),
        map(int, options.batch.split(",")),
        map(int, options.tokens.split(",")),
        options.methods.split(","),
    )
    for place, batch, tokens, method in cells:
        run = partial(make_run, place, tokenizer=tokenizer, prompts=prompts, batch=batch)
        base_run = run(model=base, tokens=tokens)
        heads = load_heads(method, base)
        base_run(0)  # warms up
        later_run = run(model=SpecModel(base, heads), tokens=tokens)
        later_run(0)
        ratios = [pair(base_run, later_run, index) for index in range(options.calls)]
        firsts = []
        for index in range(options.first):
            fresh = run(model=SpecModel(base, load_heads(method, base)), tokens=tokens)
            firsts.append(pair(base_run, fresh, index))
        settings = {"place": place, "method": method, "batch": batch, "max_new_tokens": tokens}
        settings |= {"set": options.set, "dtype": "float32", "device": "cpu"}
        report(options.out, ratios, {**settings, "calls": "later"})
        if firsts:
            report(options.out, firsts, {**settings, "calls": "first"})


def load_heads(method: str, base: Any) -> Any:
    """Return the proposer of a method."""
    if method in ("none", "useless"):
        return UselessProposer() if method == "useless" else None
    heads: Any = "ngram" if method == "ngram" else assets()[method]
    return SpecModel.from_pretrained(base, heads).proposer


def report(path: Path, pairs: Sequence[tuple[float, float]], settings: dict[str, Any]) -> None:
    """Print and record the base's seconds over ours: by pair, and of all calls together."""
    spread = Spread.of([theirs / ours for theirs, ours in pairs])
    overall = sum(theirs for theirs, _ in pairs) / sum(ours for _, ours in pairs)
    record = Record(
        benchmark="short_calls",
        settings=settings,
        unit="times regular generation",
        n=len(pairs),
        median=spread.median,
        lower_quartile=spread.lower_quartile,
        upper_quartile=spread.upper_quartile,
        num_identical=len(pairs),
    )
    if str(path) != "-":
        append_record(path, record)
    names = " ".join(str(settings[name]) for name in ("place", "method", "batch", "max_new_tokens"))
    print(
        f"{names} {settings['calls']}: {spread.median:.3f} "
        f"[{spread.lower_quartile:.3f}, {spread.upper_quartile:.3f}], in all {overall:.3f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
