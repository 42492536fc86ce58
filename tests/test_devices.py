"""Which devices Python reads at no cost, and tokens on the path of the others."""

import pytest
import torch

from speclm import SpecModel
from speclm.devices import device_path, is_host
from tests.models import build_model, prompts
from tests.outcomes import observe, require_same
from tests.proposers import build_proposer


def test_only_a_cpu_is_read_at_no_cost():
    assert is_host(torch.device("cpu"))
    assert not is_host(torch.device("cuda"))
    assert not is_host(torch.device("meta"))


def test_inside_the_device_path_a_cpu_acts_as_an_accelerator():
    with device_path():
        assert not is_host(torch.device("cpu"))
    assert is_host(torch.device("cpu"))


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize(
    "kind", ["random tree", "twin draft", "other draft", "Medusa that hits", "EAGLE that hits"]
)
def test_tokens_on_the_device_path_are_those_of_regular_generation(kind, do_sample):
    base, inputs = build_model("llama"), prompts(7, 3, 5)
    arguments = {"max_new_tokens": 16, "do_sample": do_sample, "eos_token_id": [3, 9]}
    expected = observe(base, inputs, arguments, base=base)
    reference = expected.new_tokens(inputs)
    draft = build_model("llama", seed=5)
    proposer = build_proposer(kind, reference, target=base, draft=draft)
    with device_path():
        found = observe(SpecModel(base, proposer), inputs, arguments, base=base)
    require_same(found, expected)
    assert found.num_forwards <= expected.num_forwards
