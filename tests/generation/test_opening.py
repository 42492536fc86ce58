"""Which session a generation gets, and when it gets none."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

from speclm.generation.delegation import NeedsRegularGeneration
from speclm.generation.opening import meets_switch, open_session
from speclm.self_check.verdict import Verification
from speclm.target import TargetView
from speclm.target.chain_session import ChainSession
from speclm.target.session import TreeSession
from tests.models import build_model, prompts, shared_model

NOTHING_PADDED = torch.tensor([0])


def opened(family, backend, *, cache, given=None, num_tokens=6):
    inputs = {"past_key_values": cache, "use_cache": True}
    view = TargetView(shared_model(family))
    return open_session(
        view, backend, inputs, {}, NOTHING_PADDED, given=given, num_tokens=num_tokens
    )


def filled(family):
    model = shared_model(family)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(**prompts(4), past_key_values=cache, use_cache=True)
    return cache


@pytest.mark.parametrize(
    ("family", "backend", "kind"),
    [
        ("llama", Verification.TREES, TreeSession),
        ("llama", Verification.CHAINS, ChainSession),
        ("qwen3_next", Verification.CHAINS, ChainSession),
    ],
)
def test_session_is_of_the_backend_and_knows_what_a_cache_holds(family, backend, kind):
    empty = DynamicCache(config=shared_model(family).config)
    session = opened(family, backend, cache=empty)
    assert isinstance(session, kind)
    assert session.num_cached == 0
    cache = filled(family)
    assert opened(family, backend, cache=cache, given=cache).num_cached == 4


@pytest.mark.parametrize("backend", [Verification.TREES, Verification.CHAINS])
def test_caches_of_other_kinds_are_left_to_plain_decoding(backend):
    cache = StaticCache(config=shared_model("llama").config, max_cache_len=16)
    with pytest.raises(NeedsRegularGeneration, match="StaticCache"):
        opened("llama", backend, cache=cache, given=cache)


def test_switch_is_met_by_positions_and_read_again_by_slots():
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = build_model("llama", rope_parameters=dynamic, max_position_embeddings=20)
    view = TargetView(model)
    assert not meets_switch(view, NOTHING_PADDED, start=5, end=12)
    assert meets_switch(view, NOTHING_PADDED, start=5, end=25)
    assert not meets_switch(view, torch.tensor([9, 9]), start=14, end=25)
    assert not meets_switch(TargetView(shared_model("llama")), NOTHING_PADDED, start=5, end=900)
