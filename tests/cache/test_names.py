import inspect

from transformers import DynamicCache, GenerationMixin, LlamaForCausalLM, Mamba2Config
from transformers import Mamba2ForCausalLM as Mamba2
from transformers.generation.utils import GenerateDecoderOnlyOutput

from speclm.cache import CACHE_NAME, cache_name
from tests.models import prompts, shared_model


def test_models_take_and_return_a_cache_under_the_name():
    cache = DynamicCache()
    output = shared_model("llama")(**prompts(4), **{CACHE_NAME: cache}, use_cache=True)
    assert output[CACHE_NAME] is cache
    assert cache.get_seq_length() == 4
    assert CACHE_NAME in inspect.signature(LlamaForCausalLM.forward).parameters
    assert GenerateDecoderOnlyOutput(sequences=None, **{CACHE_NAME: cache})[CACHE_NAME] is cache


def test_a_models_own_name_is_that_of_generate():
    sizes = {"hidden_size": 8, "num_heads": 4, "head_dim": 4, "n_groups": 1, "vocab_size": 16}
    recurrent = Mamba2(Mamba2Config(**sizes, num_hidden_layers=1, state_size=4))
    for model in (shared_model("llama"), recurrent):
        prepared = {}
        GenerationMixin._prepare_cache_for_generation(
            model, model.generation_config, prepared, None, 1, 8
        )
        assert list(prepared) == [cache_name(model)]
