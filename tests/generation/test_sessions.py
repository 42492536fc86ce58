"""Sessions are of the kind that verifies, and continue from a caller's cache."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

from speclm.cache import CACHE_NAME
from speclm.generation.regular import NeedsRegularGeneration
from speclm.generation.request import Prompt, Setup
from speclm.generation.sessions import open_session
from speclm.self_check.verdict import Verification
from speclm.target import StaticForward, TargetView
from speclm.target.chain_session import ChainSession
from speclm.target.session import TreeSession
from tests.models import prompts, shared_model
from tests.stand_ins import replaying


def opened(family, backend, *, cache, given=None, num_tokens=6, engine=None):
    view = TargetView(shared_model(family))
    tokens = torch.zeros(1, num_tokens, dtype=torch.long)
    prompt = Prompt(
        input_ids=tokens,
        embeddings=None,
        model_inputs={CACHE_NAME: cache, "use_cache": True},
        images={},
        num_padding=torch.tensor([0]),
        num_unseen=0,
        first_token=0,
        cache=given,
    )
    static = None if engine is None else StaticForward(view, engine)
    return open_session(prompt, Setup(view, None, verification=backend, static=static))


def filled(family):
    model = shared_model(family)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(**prompts(4), **{CACHE_NAME: cache}, use_cache=True)
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


def test_an_engine_gets_storage_whose_capacity_doubles():
    session = opened(
        "llama",
        Verification.TREES,
        cache=filled("llama"),
        given=filled("llama"),
        engine=replaying(),
    )
    cache = session.cache
    assert cache.capacity == 256
    cache.reserve(300)
    assert cache.capacity == 512
    cache.reserve(600)
    assert cache.capacity == 1024
