"""What a training computes, step by step: what decoding would."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from speclm.methods.mtp.rollout import roll_out
from speclm.methods.mtp.training import load_mtp_heads
from speclm.target import TargetView
from tests.methods.mtp.mtp_bases import ROWS, TOLERANCE, make_base, reference_logits
from tests.models import WINDOW, prompts

LENGTH, STEPS = WINDOW + 6, 4


@pytest.mark.parametrize("name", ["qwen3_next", "glm4_moe", "mimo_v2_flash", "mimo"])
def test_every_step_computes_what_full_forwards_over_text_and_draft_do(name, tmp_path):
    made = make_base(tmp_path, name)
    heads = load_mtp_heads(AutoModelForCausalLM.from_pretrained(tmp_path))
    view, rows = TargetView(made.base), prompts(LENGTH, LENGTH)["input_ids"]
    sources = torch.tensor([[1, 6, LENGTH - 3], [2, 7, LENGTH - 2]])
    with torch.no_grad():
        features = made.base(rows, output_hidden_states=True).hidden_states[-1]
        outputs = roll_out(
            heads,
            features,
            rows,
            sources,
            num_steps=STEPS,
            embedding=view.stored_embeddings,
        )
        for step, output in enumerate(outputs):
            logits = heads.logits(output, step, lm_head=view.head_logits)
            for row, index in ((0, 0), (1, 1), (0, 2)):
                root = int(sources[row, index]) + 1
                if root + step >= LENGTH:  # reads tokens that do not exist
                    continue
                text, path = rows[row, : root + 1], rows[row, root + 1 : root + 1 + step].tolist()
                first = ROWS[name].names is ROWS["mimo"].names
                expected = reference_logits(made, text, path, hidden_first=first)
                torch.testing.assert_close(logits[row, index], expected, **TOLERANCE)
    assert step == STEPS - 1
