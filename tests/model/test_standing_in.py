"""A `SpecModel` is taken for its base, and moves as one."""

import copy
import pickle
from inspect import signature

import pytest
import torch
from transformers import GenerationConfig, PreTrainedModel

from speclm import SpecModel
from speclm.drafting.combined import CombinedProposer
from speclm.errors import OptionError
from speclm.methods.draft_model.proposer import DraftModelProposer
from speclm.methods.medusa.network import MedusaHeads, MedusaHeadsConfig
from speclm.methods.medusa.proposer import MedusaProposer
from speclm.methods.ngram.proposer import NgramProposer
from speclm.model.fitting import proposer_modules
from tests.callbacks import Tokens
from tests.models import VOCAB_SIZE, build_model, generate, prompts

SETTINGS = {"do_sample": True, "max_new_tokens": 8}


def medusa(base):
    config = MedusaHeadsConfig(
        hidden_size=base.config.hidden_size, vocab_size=VOCAB_SIZE, num_heads=2, num_layers=1
    )
    return MedusaProposer(MedusaHeads(config), target=base)


@pytest.fixture
def base():
    return build_model("llama")


@pytest.fixture
def spec(base):
    draft = DraftModelProposer(build_model("llama", seed=7), target=base)
    return SpecModel(base, CombinedProposer([NgramProposer(), draft, medusa(base)]))


def require_identical(spec, base, **settings):
    expected, state = generate(base, prompts(8, 5), **SETTINGS, **settings)
    found, state_found = generate(spec, prompts(8, 5), **SETTINGS, **settings)
    assert torch.equal(found, expected)
    assert torch.equal(state_found, state)
    assert spec.last_speculation.fallbacks == []


def test_it_is_taken_for_the_base_and_for_itself(spec, base):
    assert isinstance(spec, PreTrainedModel)
    assert isinstance(spec, type(base))
    assert isinstance(spec, SpecModel)
    assert spec.__class__ is type(base)
    assert type(spec) is SpecModel


def test_what_it_does_not_define_is_the_bases(spec, base):
    inputs = prompts(6)
    assert torch.equal(spec(**inputs).logits, base(**inputs).logits)
    assert spec.can_generate()
    assert spec.state_dict().keys() == base.state_dict().keys()
    assert spec.get_input_embeddings() is base.get_input_embeddings()
    assert {"print_report", "proposer", "last_speculation", "lm_head"} <= set(dir(spec))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = spec.nonsense


def test_what_the_base_has_is_written_to_the_base(spec, base):
    config = GenerationConfig(max_new_tokens=3, do_sample=False, pad_token_id=0)
    spec.generation_config = config
    assert base.generation_config is config
    assert spec.generate(**prompts(4)).shape == (1, 7)
    spec.training = True
    assert base.training
    spec.remark = "mine"
    assert "remark" not in vars(base)


def test_it_may_be_wrapped_again(spec, base):
    assert SpecModel.from_pretrained(spec, "ngram").base is base
    assert SpecModel(spec, None).base is base


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda spec: pickle.loads(pickle.dumps(spec))]
)
def test_copy_shares_nothing_and_gives_the_same_tokens(spec, base, duplicate):
    spec.generate(**prompts(6), **SETTINGS)  # so that there is state to copy
    copied = duplicate(spec)
    assert type(copied) is SpecModel
    assert copied.base is not base
    assert copied.proposer.parts[2].view.model is copied.base
    require_identical(copied, base)
    with torch.no_grad():
        base.get_input_embeddings().weight.zero_()
    require_identical(copied, copied.base)


@pytest.mark.parametrize(
    ("name", "args", "dtype"),
    [
        ("to", (torch.float64,), torch.float64),
        ("to", ("cpu",), torch.float32),
        ("double", (), torch.float64),
        ("cpu", (), torch.float32),
    ],
)
def test_heads_and_draft_models_move_along(spec, base, name, args, dtype):
    assert getattr(spec, name)(*args) is spec
    modules = [base, spec.proposer.parts[1].view.model, spec.proposer.parts[2].heads]
    assert {parameter.dtype for m in modules for parameter in m.parameters()} == {dtype}
    require_identical(spec, base)


@pytest.mark.parametrize(("name", "dtype"), [("half", "float16"), ("bfloat16", "bfloat16")])
def test_half_precision_is_that_of_all(spec, base, name, dtype):
    assert getattr(spec, name)() is spec
    assert spec.dtype == getattr(torch, dtype)
    assert {p.dtype for m in proposer_modules(spec.proposer) for p in m.parameters()} == {
        spec.dtype
    }
    spec.generate(**prompts(6), **SETTINGS)


def test_modes_are_set_and_the_model_is_returned(spec, base):
    assert spec.train() is spec
    assert all(module.training for module in proposer_modules(spec.proposer))
    assert base.training
    assert spec.eval() is spec
    assert not any(module.training for module in proposer_modules(spec.proposer))
    assert spec.requires_grad_(False) is spec
    assert not any(
        p.requires_grad for p in (*base.parameters(), *spec.proposer.parts[2].heads.parameters())
    )
    require_identical(spec, base)


def test_networks_of_a_proposer_are_found_in_its_parts(spec, base):
    found = {id(module) for module in proposer_modules(spec.proposer)}
    draft, heads = spec.proposer.parts[1].view.model, spec.proposer.parts[2].heads
    assert found == {id(draft), id(heads), id(base)}
    assert list(proposer_modules(None)) == []


def test_inference_and_grad_modes_give_the_same_tokens(spec, base):
    expected, _ = generate(base, prompts(8, 5), **SETTINGS)
    for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad):
        with mode():
            found, _ = generate(spec, prompts(8, 5), **SETTINGS)
        assert torch.equal(found, expected)
        assert not found.requires_grad


def test_arguments_may_be_positional_in_the_order_of_the_base(spec, base):
    tokens = prompts(6)["input_ids"]
    config = GenerationConfig(max_new_tokens=6, do_sample=False)

    def allowed(row: int, text: torch.Tensor) -> list[int]:
        return [7 + row, int(text[-1]) // 2]

    streams = Tokens(), Tokens()
    expected, found = (
        model.generate(tokens, config, None, None, allowed, None, None, stream)
        for model, stream in zip((base, spec), streams, strict=True)
    )
    assert torch.equal(found, expected)
    assert streams[0].calls == streams[1].calls
    names = list(signature(type(base).generate).parameters)[:8]
    assert list(signature(SpecModel.generate).parameters)[:8] == names
    with pytest.raises(OptionError, match="assistant_model"):
        spec.generate(tokens, config, None, None, None, None, base)
