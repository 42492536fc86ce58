"""What MTP layers guess: the same as Transformers' own, and as a plain reference."""

import pytest
import torch
from transformers import cache_utils, modeling_layers

from speclm import SpecModel
from speclm.drafting.interface import Prefill
from tests.methods.mtp.mtp_bases import MIMO, ROWS, make_base, reference_logits
from tests.models import prompts

TOLERANCE = {"rtol": 1e-3, "atol": 1e-3}  # large random weights, other masks and kernels
GUESSES = [7, 11, 3, 20]


def our_logits(spec, text, path):
    """Return our logits after a text and guesses, after the first of which a branch was drafted."""
    proposer = spec.proposer
    with torch.no_grad():
        features = spec.base(input_ids=text[None], output_hidden_states=True).hidden_states[-1]
        proposer.begin(
            Prefill(
                tokens=text[None, :-1],
                num_padding=torch.zeros(1, dtype=torch.long),
                first_tokens=text[-1:],
                temperature=0.0,
                max_new_tokens=9,
                features=features[:, :-1],
            )
        )
        proposer._context.catch_up()
        run = proposer._context.start([2] * len(path))
        found = [run.logits[0, 0]]
        for depth, token in enumerate(path):
            run.below(torch.tensor([[5, token]]), torch.tensor([[0, min(depth, 1)]]))
            found.append(run.logits[0, 1])
    return torch.stack(found)


@pytest.mark.parametrize("name", ROWS)
def test_logits_of_every_level_equal_a_plain_reference(name, tmp_path):
    made = make_base(tmp_path, name)
    spec = SpecModel.from_pretrained(str(tmp_path), "mtp")
    text = prompts(13)["input_ids"][0]
    is_hidden_first = ROWS[name].names is MIMO
    expected = [
        reference_logits(made, text, GUESSES[:depth], hidden_first=is_hidden_first)
        for depth in range(len(GUESSES) + 1)
    ]
    torch.testing.assert_close(our_logits(spec, text, GUESSES), torch.stack(expected), **TOLERANCE)


@pytest.mark.skipif(
    not hasattr(modeling_layers, "MtpModel"), reason="this Transformers has no MTP layers"
)
@pytest.mark.parametrize("name", ["deepseek_v3", "glm4_moe"])
def test_logits_equal_those_of_transformers(name, tmp_path):
    made = make_base(tmp_path, name)
    spec = SpecModel.from_pretrained(str(tmp_path), "mtp")
    spec.base._keys_to_ignore_on_load_unexpected = [r"model\.layers\.[2-9]\."]
    theirs, text = modeling_layers.MtpModel.from_pretrained(spec.base), prompts(13)["input_ids"][0]
    with torch.no_grad():
        states = spec.base(input_ids=text[None], output_hidden_states=True).hidden_states[-1]
        path, logits, _ = theirs(
            text[None, 1:],
            states[:, :-1],
            attention_mask=None,
            position_ids=torch.arange(1, len(text))[None],
            mtp_cache=cache_utils.MtpCache(config=spec.base.config.get_mtp_config()),
        )
    found = our_logits(spec, text, path[0].tolist())[: len(made.blocks)]
    torch.testing.assert_close(found, logits[0], **TOLERANCE)
