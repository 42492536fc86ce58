"""EAGLE heads for the bundled base, untrained, where benchmarks look for them."""

from pathlib import Path

import torch
from transformers import AutoConfig

from speclm.demo.bundle import assets
from speclm.methods.eagle.checkpoint import eagle_checkpoint, write_eagle
from speclm.methods.eagle.config import EagleConfig
from speclm.methods.eagle.network import EagleHeads


def write_eagle_folders(place: Path) -> Path:
    """Write folders `eagle` and `eagle3`, and return the folder of both."""
    base = AutoConfig.from_pretrained(assets()["base"])
    for kind, drafted in (("eagle", None), ("eagle3", 512)):
        config = EagleConfig.from_model_config(base, kind=kind, draft_vocab_size=drafted)
        heads = EagleHeads(config)
        heads.init_weights_(generator=torch.Generator().manual_seed(0))
        write_eagle(place / kind, eagle_checkpoint(heads))
    return place
