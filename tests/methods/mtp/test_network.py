"""What MTP layers predict: the same as Transformers' own."""

import pytest
import torch
from transformers import cache_utils, modeling_layers

from speclm import SpecModel
from tests.methods.mtp.mtp_bases import TOLERANCE, logits_along, make_base
from tests.models import prompts


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
            attention_mask=torch.ones(1, len(text) - 1),
            position_ids=torch.arange(1, len(text))[None],
            mtp_cache=cache_utils.MtpCache(config=spec.base.config.get_mtp_config()),
        )
    found = logits_along(spec, text, path[0].tolist())[: len(made.blocks)]
    torch.testing.assert_close(found, logits[0], **TOLERANCE)
