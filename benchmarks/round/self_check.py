"""Measure what the self-check of a loaded model costs, anew and known already.

python benchmarks/round/self_check.py
"""

import argparse
import os
import tempfile
from pathlib import Path
from time import perf_counter

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from benchmarks.round.overhead import report
from speclm.files.atomic import CACHE_VARIABLE
from speclm.self_check.check import check_model
from speclm.self_check.fingerprint import fingerprint
from speclm.self_check.verdict import Verification
from speclm.target import TargetView


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/overhead.jsonl"))
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = random_llama(options.layers, options.width, options.vocab)
    settings = {name: getattr(options, name) for name in ("layers", "width", "vocab", "threads")}
    with tempfile.TemporaryDirectory() as folder:
        for setting, cache in (("anew", ""), ("known", folder)):
            os.environ[CACHE_VARIABLE] = cache
            check_model(TargetView(model))  # warms up, and makes it known
            seconds = [check_seconds(model) for _ in range(options.runs)]
            record = {**settings, "setting": setting, "minimum": 1e3 * min(seconds)}
            report(options.out, "self_check", seconds, record)
            print(f"  minimum {record['minimum']:.2f} ms")
    view = TargetView(model)
    seconds = []
    for _ in range(options.runs):
        start = perf_counter()
        fingerprint(view)
        seconds.append(perf_counter() - start)
    record = {**settings, "setting": "fingerprint", "minimum": 1e3 * min(seconds)}
    report(options.out, "self_check", seconds, record)


def random_llama(num_layers: int, width: int, vocab_size: int) -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=11 * width // 4,
        num_hidden_layers=num_layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def check_seconds(model: PreTrainedModel) -> float:
    start = perf_counter()
    check = check_model(TargetView(model))
    seconds = perf_counter() - start
    assert check.verification is Verification.TREES
    return seconds


if __name__ == "__main__":
    main()
