"""Convert Medusa heads to the formats that vLLM up to 0.32 loads, and compare with its own code.

Heads with random weights are converted as `speclm convert` does. vLLM's config class, draft class
and loader read the folder; see `vllm_code`. Runs in an environment of its own:

    make cross-check
"""

import itertools
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging
from vllm_code import build, config_class, vllm, weights

from speclm.methods.medusa.checkpoint import MedusaCheckpoint
from speclm.methods.medusa.checkpoint_writing import write_medusa
from speclm.methods.medusa.network import MedusaHeads, MedusaHeadsConfig
from speclm.model.exporting import convert_heads

# Of the largest logit: float32 sums in another order.
TOLERANCE = 1e-5
VERSION = "0.32.0"  # the last with Medusa
HIDDEN, VOCAB = 64, 512
BASE = LlamaConfig(
    hidden_size=HIDDEN,
    intermediate_size=160,
    num_hidden_layers=1,
    num_attention_heads=4,
    vocab_size=VOCAB,
)


def random_heads(config: MedusaHeadsConfig) -> MedusaCheckpoint:
    """Return heads whose every number matters."""
    generator = torch.Generator().manual_seed(1)
    numbers = {
        name: torch.randn(tensor.shape, generator=generator) * HIDDEN**-0.5
        for name, tensor in MedusaHeads(config).state_dict().items()
    }
    return MedusaCheckpoint.of_stacked(
        numbers["weight"], numbers.get("bias"), numbers.get("lm_weight"), vocab_size=VOCAB
    )


@torch.no_grad()
def difference(place: Path, config: MedusaHeadsConfig, to: str) -> float:
    """Return the largest difference of a logit, relative to the largest one."""
    heads = random_heads(config)
    write_medusa(place / "heads", heads)
    convert_heads(place / "heads", place / to, to=to, base=place.parent / "base")
    with vllm(VERSION):
        described = config_class("medusa", "MedusaConfig").from_pretrained(place / to)
        model = build("medusa", "Medusa", described)
        loaded = model.load_weights(weights(place / to))
    left = {name for name, _ in model.named_parameters()} - loaded
    assert not left, f"missing: {left}"
    matrix = load_file(place.parent / "base" / "model.safetensors")["lm_head.weight"]
    states = torch.randn(9, HIDDEN, generator=torch.Generator().manual_seed(2))
    theirs = torch.stack(model.compute_logits(model(states)), dim=1)
    network = MedusaHeads(config)
    network.load_state_dict(heads.stacked())
    ours = network(states, lm_head=lambda x: x @ matrix.T)
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max() / ours.abs().max())


def main() -> int:
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    failed = 0
    with tempfile.TemporaryDirectory() as created:
        LlamaForCausalLM(BASE).save_pretrained(Path(created, "base"))
        grid = itertools.product(("vllm", "tgi"), (False, True), (False, True), (1, 2), (1, 5))
        for index, (to, has_own, has_bias, num_layers, num_heads) in enumerate(grid):
            config = MedusaHeadsConfig(
                hidden_size=HIDDEN,
                vocab_size=VOCAB,
                num_heads=num_heads,
                num_layers=num_layers,
                has_own_lm_head=has_own,
                has_bias=has_bias,
            )
            found = difference(Path(created, f"{index}"), config, to)
            is_close = found <= TOLERANCE  # not so where it is no number
            failed += not is_close
            parts = (
                f"heads {num_heads}, layers {num_layers}, "
                f"{'own' if has_own else 'shared'} matrix, {'a' if has_bias else 'no'} bias"
            )
            mark = "ok" if is_close else "DIFFERS"
            print(f"{'vLLM 0.32.0':24s} {to:12s} {parts:44s} {found:.1e} {mark}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
