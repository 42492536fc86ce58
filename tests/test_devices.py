"""Which devices Python reads at no cost, and tokens on the path of the others."""

import pytest
import torch

from speclm import SpecModel
from speclm.devices import device_path, is_host, upload
from speclm.methods.draft_model.proposer import DraftModelProposer
from tests.models import build_model, prompts
from tests.outcomes import observe, require_same
from tests.proposers import build_proposer
from tests.stand_ins import replaying


def test_only_a_cpu_is_read_at_no_cost():
    assert is_host(torch.device("cpu"))
    assert not is_host(torch.device("cuda"))
    assert not is_host(torch.device("meta"))


def test_lists_are_uploaded_as_integers():
    device = torch.device("cpu")
    assert upload([[1, 2], [3, -1]], device).tolist() == [[1, 2], [3, -1]]
    assert upload([], device).dtype == torch.long


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


@pytest.mark.parametrize(("do_sample", "engine"), [(False, "graph"), (True, "graph"), (True, "")])
def test_wide_trees_of_a_device_follow_their_paths_also_by_an_engine(do_sample, engine):
    base, inputs = build_model("llama"), prompts(7, 3, 5)
    arguments = {"max_new_tokens": 16, "do_sample": do_sample, "eos_token_id": [3, 9]}
    expected = observe(base, inputs, arguments, base=base)
    options = {"width": 3, "branches": 3, "num_draft_tokens": 12, "min_confidence": 0.0}
    draft = DraftModelProposer(build_model("llama"), target=base, **options)
    model = SpecModel(base, draft, adaptive=False, engine=replaying() if engine else "eager")
    with device_path():
        for _ in range(2):
            found = observe(model, inputs, arguments, base=base)
            require_same(found, expected)
    assert model.last_speculation.engine == (engine or "eager")
    assert model.last_speculation.tau > 2
