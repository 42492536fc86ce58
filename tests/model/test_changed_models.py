"""Models that were changed, or that are random, give the tokens of `base.generate` or say why."""

import logging

import peft
import pytest
import torch
from transformers import DynamicCache, LlamaForCausalLM

from speclm import SpecModel
from speclm.cache import CACHE_NAME
from speclm.methods.draft_model.proposer import DraftModelProposer
from speclm.methods.medusa.network import MedusaHeads, MedusaHeadsConfig
from speclm.methods.medusa.proposer import MedusaProposer
from speclm.methods.ngram.proposer import NgramProposer
from speclm.self_check.verdict import Verification
from tests.exactness import require_exact
from tests.models import VOCAB_SIZE, build_model, generate, prompts

INPUTS = prompts(6, 4)
SETTINGS = {"do_sample": True, "max_new_tokens": 8}


@pytest.fixture
def base():
    return build_model("llama")


def one_layer_in_training(model):
    model.model.layers[1].self_attn.train()


def adapter_with_dropout(model):
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=4, lora_dropout=0.3, target_modules=["q_proj"], init_lora_weights=False
    )
    peft.inject_adapter_in_model(config, model)  # as Transformers' `add_adapter`


@pytest.mark.parametrize("change", [one_layer_in_training, adapter_with_dropout])
def test_modules_in_training_mode_are_named_with_the_remedy(change):
    base = build_model("llama", attention_dropout=0.3)
    spec = SpecModel(base, None)
    change(base)
    require_exact(spec, INPUTS, plainly="is in training mode", **SETTINGS)
    (reason,) = spec.last_speculation.fallbacks
    assert reason.startswith("module 'model.layers.")
    assert "call .eval() on the model" in reason
    base.eval()
    require_exact(spec, INPUTS, **SETTINGS)


def draws(module, arguments, output):
    return output + 0.1 * torch.rand_like(output)


def test_forwards_that_draw_in_evaluation_mode_are_left_to_regular_generation(base):
    base.model.layers[1].mlp.register_forward_hook(draws)
    state = torch.get_rng_state()
    spec = SpecModel(base, None)
    assert torch.equal(torch.get_rng_state(), state)
    require_exact(spec, INPUTS, plainly="module 'model.layers.1.mlp' draws", **SETTINGS)


def steer_last(module, arguments, output):
    return torch.cat([output[:, :-1], output[:, -1:] + 1.0], dim=1)


def steer_single(module, arguments, output):
    return output + 1.0 if output.shape[1] == 1 else output


def steer_by(hook):
    return lambda model: model.model.layers[0].register_forward_hook(hook)


def drop_positions(model):
    own = model.prepare_inputs_for_generation

    def prepare(*args, is_first_iteration=False, **kwargs):
        inputs = own(*args, is_first_iteration=is_first_iteration, **kwargs)
        if not is_first_iteration:
            inputs["position_ids"] = inputs["position_ids"] + 3
        return inputs

    model.prepare_inputs_for_generation = prepare


def wrapped_call(model):
    """Steps are called by attribute, the prompt's forward is not."""

    def call(**inputs):
        output = type(model).__call__(model, **inputs)
        output.logits = -output.logits
        return output

    model.__call__ = call


def own_forward(model):
    own = model.forward

    def forward(*args, **kwargs):
        output = own(*args, **kwargs)
        output.logits[:, -1] = -output.logits[:, -1]
        return output

    model.forward = forward


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (steer_by(steer_last), "'model.layers.0' has a forward hook"),
        (steer_by(steer_single), "'model.layers.0' has a forward hook"),
        (wrapped_call, "__call__ of the model object is replaced"),
        (own_forward, "forward of the model is replaced"),
    ],
)
def test_what_is_changed_after_wrapping_is_noticed_and_named(base, change, words):
    spec = SpecModel(base, None)
    require_exact(spec, INPUTS, **SETTINGS)
    change(base)
    require_exact(spec, INPUTS, plainly=words, **SETTINGS)
    assert spec.self_check.verification is Verification.REGULAR


def test_chains_honour_the_inputs_that_a_model_prepares_itself(base):
    spec = SpecModel(base, None)
    drop_positions(base)
    generate(spec, INPUTS, **SETTINGS)  # in which the model is checked again
    require_exact(spec, INPUTS, **SETTINGS)
    assert spec.last_speculation.verification == "chains"
    assert "prepare_inputs_for_generation of the model object" in spec.self_check.reason
    del base.prepare_inputs_for_generation  # as it was when it was wrapped
    require_exact(spec, INPUTS, **SETTINGS)
    assert spec.self_check.verification is Verification.TREES


class OwnUpdate(LlamaForCausalLM):
    def _update_model_kwargs_for_generation(self, *args, **kwargs):
        updated = super()._update_model_kwargs_for_generation(*args, **kwargs)
        updated["position_ids"][:, -1] += 2
        return updated


class OwnEnd(LlamaForCausalLM):
    def _has_unfinished_sequences(self, this_peer_finished, synced_gpus, device):
        self.num_steps = getattr(self, "num_steps", 0) + 1
        return self.num_steps % 4 != 0


class OwnLoop(LlamaForCausalLM):
    def _sample(self, input_ids, **kwargs):
        return super()._sample(input_ids, **kwargs)[:, :-1]


class OwnAnswer(LlamaForCausalLM):
    def generate(self, *args, **kwargs):
        return super().generate(*args, **kwargs)[:, -3:]


class Forgetful(DynamicCache):
    """Stands for caches that keep less than they are given."""


class OwnCache(LlamaForCausalLM):
    def _prepare_cache_for_generation(self, config, model_kwargs, *args, **kwargs):
        model_kwargs[CACHE_NAME] = Forgetful(config=self.config)


class OwnPositions(LlamaForCausalLM):
    def _prepare_position_ids_for_generation(self, *args, **kwargs):
        positions = super()._prepare_position_ids_for_generation(*args, **kwargs)
        positions[:, [-3, -2]] = positions[:, [-2, -3]]
        return positions


def of_class(kind):
    base = build_model("llama")
    model = kind(base.config)
    model.load_state_dict(base.state_dict())
    return model.eval()


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (OwnUpdate, "OwnUpdate overrides _update_model_kwargs_for_generation"),
        (OwnCache, "cache of type Forgetful"),
        (OwnEnd, "OwnEnd has its own _has_unfinished_sequences"),
        (OwnLoop, "OwnLoop has its own _sample"),
    ],
)
def test_what_a_class_overrides_of_a_step_is_named(kind, words):
    require_exact(SpecModel(of_class(kind), None), INPUTS, plainly=words, **SETTINGS)


def test_what_a_class_does_with_the_answer_is_honoured():
    model = of_class(OwnAnswer)
    expected = generate(model, INPUTS, **SETTINGS)
    found = generate(SpecModel(model, NgramProposer()), INPUTS, **SETTINGS)
    assert expected[0].shape == (2, 3)
    assert all(map(torch.equal, found, expected))


def test_positions_that_a_class_gives_to_the_prompt_are_honoured():
    require_exact(SpecModel(of_class(OwnPositions), None), INPUTS, **SETTINGS)


def draft_model(base):
    draft = build_model("llama", seed=1, attention_dropout=0.3)
    return DraftModelProposer(draft, target=base), draft


def heads(base):
    module = MedusaHeads(MedusaHeadsConfig(hidden_size=40, vocab_size=VOCAB_SIZE, num_heads=2))
    return MedusaProposer(module, target=base), module


def last_of(module):
    return list(module.modules())[-1]


@pytest.mark.parametrize("build", [draft_model, heads])
def test_draws_of_what_drafts_change_nothing_and_training_mode_is_said_once(base, build, caplog):
    torch.manual_seed(0)
    proposer, module = build(base)
    spec = SpecModel(base, proposer)
    last_of(module).register_forward_hook(draws)
    module.train()
    with caplog.at_level(logging.WARNING, logger="speclm"):
        for settings in (SETTINGS, {**SETTINGS, "do_sample": False}):
            require_exact(spec, INPUTS, proposer=lambda _: proposer, is_faster=False, **settings)
    (line,) = [record.getMessage() for record in caplog.records if record.name == "speclm"]
    assert f"the model of {type(module).__name__} is in training mode" in line


class ShiftsLate(LlamaForCausalLM):
    """Counts positions otherwise once the text is long."""

    def prepare_inputs_for_generation(self, input_ids, **kwargs):
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        if input_ids.shape[1] > 20:
            inputs["position_ids"] = inputs["position_ids"] * 2
        return inputs


def test_override_that_acts_on_later_steps_is_noticed(base):
    base.__class__ = ShiftsLate
    spec = SpecModel(base, None)
    reason = "overrides prepare_inputs_for_generation"
    require_exact(spec, INPUTS, plainly=reason, **(SETTINGS | {"max_new_tokens": 24}))


class DrawsForOneToken(torch.nn.Module):
    def forward(self, hidden):
        return hidden + torch.randn_like(hidden) if hidden.shape[:2] == (1, 1) else hidden


def test_draws_that_only_one_row_makes_exclude_chains_too(base):
    mlp = base.model.layers[1].mlp
    base.model.layers[1].mlp = torch.nn.Sequential(mlp, DrawsForOneToken()).eval()
    spec = SpecModel(base, None)
    assert spec.self_check.verification is Verification.REGULAR
    assert "draws random numbers" in spec.self_check.reason


class SwitchedEmbedding(torch.nn.Embedding):
    is_on = False

    def forward(self, tokens):
        found = super().forward(tokens)
        return found * 2 if self.is_on and tokens.shape[1] == 1 else found


def test_switch_of_a_module_of_others_is_seen(base):
    base.model.embed_tokens.__class__ = SwitchedEmbedding
    spec = SpecModel(base, None)
    assert spec.self_check.verification is Verification.TREES
    base.model.embed_tokens.is_on = True
    require_exact(spec, INPUTS, plainly="SwitchedEmbedding is not of Transformers", **SETTINGS)


def test_new_embeddings_in_training_mode_change_nothing(base):
    spec = SpecModel(base, NgramProposer())
    base.resize_token_embeddings(VOCAB_SIZE + 8)
    base.lm_head.train()
    spec.generate(**INPUTS, max_new_tokens=1)  # which checks it again
    require_exact(spec, INPUTS, **SETTINGS)
