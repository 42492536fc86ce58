"""Forwards of a base without its logits, and logits from what they return."""

import torch

from speclm.target import TargetView
from speclm.training.base_forward import base_logits, last_hidden, run_decoder
from tests.models import shared_model

CLOSE = 1e-5  # float32 logits


def test_hidden_states_and_logits_are_those_of_the_whole_model():
    base = shared_model("llama")
    tokens, mask = torch.tensor([[3, 5, 7]]), torch.ones(1, 3, dtype=torch.long)
    with torch.no_grad():
        output = base(tokens, output_hidden_states=True)
        last = last_hidden(TargetView(base), tokens, mask)
    states = run_decoder(TargetView(base), tokens, mask, (1, 0, -1))
    expected = [output.hidden_states[index] for index in (1, 0, -1)]
    torch.testing.assert_close(states, torch.cat(expected, -1), atol=CLOSE, rtol=0)
    logits = base_logits(TargetView(base), last.double())
    torch.testing.assert_close(logits.view_as(output.logits), output.logits, atol=CLOSE, rtol=0)
