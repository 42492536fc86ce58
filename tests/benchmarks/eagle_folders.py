"""EAGLE heads for the bundled base, untrained, where benchmarks look for them."""

from pathlib import Path

import torch
from transformers import AutoConfig

from speclm.demo import assets
from speclm.formats import write_eagle
from speclm.heads import EagleConfig, EagleHeads, eagle_checkpoint


def write_eagle_folders(place: Path) -> Path:
    """Write folders `eagle` and `eagle3`, and return the folder of both."""
    base = AutoConfig.from_pretrained(assets()["base"])
    for kind, drafted in (("eagle", None), ("eagle3", 512)):
        config = EagleConfig.from_model_config(base, kind=kind, draft_vocab_size=drafted)
        heads = EagleHeads(config)
        heads.init_weights_(generator=torch.Generator().manual_seed(0))
        write_eagle(place / kind, eagle_checkpoint(heads))
    return place
