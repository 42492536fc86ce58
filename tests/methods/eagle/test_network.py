"""EAGLE heads against a forward written out in loops, and what they keep and change."""

import math

import pytest
import torch
from transformers import DynamicCache, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from speclm.errors import OptionError
from speclm.methods.eagle.checkpoint import eagle_checkpoint
from speclm.methods.eagle.config import EagleConfig
from speclm.methods.eagle.network import EagleHeads, KeyValueStore, build_eagle

CLOSE = 1e-6  # float32 values of about 1, next to double ones
HIDDEN, VOCAB = 8, 13
NUMBERS = {
    "hidden_size": HIDDEN,
    "intermediate_size": 10,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "vocab_size": VOCAB,
    "draft_vocab_size": VOCAB,
    "target_hidden_size": HIDDEN,
}
EAGLE3 = {
    **NUMBERS,
    "kind": "eagle3",
    "num_features": 3,
    "draft_vocab_size": 5,
    "has_own_lm_head": True,
    "rms_norm_eps": 1e-2,
}


def heads_of(**numbers) -> EagleHeads:
    heads = EagleHeads(EagleConfig(**{"kind": "eagle", **NUMBERS, **numbers}))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in heads.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.3 * drawn if "norm" in name else 0.2 * drawn)
    return heads.requires_grad_(False)


def inputs_of(heads: EagleHeads, *, batch=2, seq=5):
    generator = torch.Generator().manual_seed(1)
    config = heads.config
    width = config.num_features * config.target_hidden_size
    features = torch.randn(batch, seq, width, generator=generator)
    embeddings = torch.randn(batch, seq, config.hidden_size, generator=generator)
    return features, embeddings, torch.arange(3, 3 + seq).expand(batch, -1)


def is_close(found, expected) -> bool:
    return torch.allclose(found, expected.to(found), atol=CLOSE, rtol=0)


def linear(state, name, x):
    out = state[f"{name}.weight"] @ x
    if f"{name}.bias" in state:
        out = out + state[f"{name}.bias"]
    return out


def normed(state, name, x, eps):
    return x / math.sqrt(sum(float(v) ** 2 for v in x) / len(x) + eps) * state[f"{name}.weight"]


def rotated(x, position, theta):
    """Turn the pairs (i, i + half) of a head by the angles of their position."""
    half, out = len(x) // 2, x.clone()
    for i in range(half):
        angle = position * theta ** (-2 * i / len(x))
        cos, sin = math.cos(angle), math.sin(angle)
        out[i] = x[i] * cos - x[i + half] * sin
        out[i + half] = x[i + half] * cos + x[i] * sin
    return out


def fused(state, config, features):
    """Return the first hidden state of one slot of EAGLE-3."""
    width = config.target_hidden_size
    if config.fc_norm:
        parts = [features[i * width : (i + 1) * width] for i in range(config.num_features)]
        features = torch.cat(
            [
                normed(state, f"feature_norms.{i}", part, config.rms_norm_eps)
                for i, part in enumerate(parts)
            ]
        )
    if config.norm_before_fc:
        features = normed(state, "feature_norm", features, config.rms_norm_eps)
    return linear(state, "fc", features)


def attended(state, config, layer, states, positions):
    """Attend from each slot to itself and those before, head by head."""
    size, eps = config.head_dim, config.rms_norm_eps
    group = config.num_attention_heads // config.num_key_value_heads
    theta = config.rope_parameters["rope_theta"]

    def head(part, x, index, position):
        name = f"layers.{layer}.self_attn.{part}"
        y = linear(state, f"{name}_proj", x)[index * size : (index + 1) * size]
        if f"{name}_norm.weight" in state:
            y = normed(state, f"{name}_norm", y, eps)
        return y if part == "v" else rotated(y, position, theta)

    outputs = []
    for slot, x in enumerate(states):
        joined = []
        for index in range(config.num_attention_heads):
            query = head("q", x, index, positions[slot])
            first = max(0, slot + 1 - (config.sliding_window or slot + 1))
            seen = range(first, slot + 1)
            keys = [head("k", states[j], index // group, positions[j]) for j in seen]
            values = [head("v", states[j], index // group, positions[j]) for j in seen]
            weights = [math.exp(float(query @ key) / math.sqrt(size)) for key in keys]
            total = sum(weights)
            joined.append(sum(w / total * v for w, v in zip(weights, values, strict=True)))
        outputs.append(linear(state, f"layers.{layer}.self_attn.o_proj", torch.cat(joined)))
    return outputs


def plain_forward(heads, features, embeddings, positions):
    """Return the outputs of one row, written out."""
    state = {name: tensor.double() for name, tensor in heads.state_dict().items()}
    config = heads.config
    eps, is_eagle3 = config.rms_norm_eps, config.kind == "eagle3"
    if is_eagle3:
        hidden = [fused(state, config, x) for x in features]
    else:
        hidden = [
            linear(state, "fc", torch.cat((e, h)))
            for e, h in zip(embeddings, features, strict=True)
        ]
    for layer in range(config.num_layers):
        name = f"layers.{layer}"
        states = residual = hidden
        if is_eagle3 and layer == 0:
            own = [normed(state, f"{name}.hidden_norm", h, eps) for h in hidden]
            given = [normed(state, f"{name}.input_layernorm", e, eps) for e in embeddings]
            states = [torch.cat(pair) for pair in zip(given, own, strict=True)]
            residual = own if config.norm_before_residual else hidden
        elif layer > 0:
            states = [normed(state, f"{name}.input_layernorm", h, eps) for h in hidden]
        outputs = attended(state, config, layer, states, positions)
        hidden = []
        for before, change in zip(residual, outputs, strict=True):
            middle = before + change
            x = normed(state, f"{name}.post_attention_layernorm", middle, eps)
            gate = linear(state, f"{name}.mlp.gate_proj", x)
            wide = gate / (1 + torch.exp(-gate)) * linear(state, f"{name}.mlp.up_proj", x)
            hidden.append(middle + linear(state, f"{name}.mlp.down_proj", wide))
    if config.norm_output:
        hidden = [normed(state, "norm", h, eps) for h in hidden]
    return torch.stack(hidden)


CASES = {
    "eagle": {},
    "fc bias": {"fc_bias": True},
    "qkv bias": {"attention_bias": True, "fc_bias": True},
    "two layers": {"num_layers": 2, "attention_output_bias": True},
    "grouped": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6},
    "eagle3": EAGLE3,
    "eagle3 grouped": {
        **EAGLE3,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 50.0},
    },
    "norm before residual": {**EAGLE3, "norm_before_residual": True, "attention_bias": True},
    "fc norm, norm output": {**EAGLE3, "fc_norm": True, "norm_output": True, "has_qk_norm": True},
    "norm before fc": {**EAGLE3, "norm_before_fc": True, "fc_bias": True},
    "other width": {**EAGLE3, "target_hidden_size": 6, "has_own_embeddings": True},
    "four features": {**EAGLE3, "num_features": 4, "feature_layers": (0, 1, 2, 5)},
    "three layers": {**EAGLE3, "num_layers": 3, "sliding_window": 2},
}


@pytest.mark.parametrize("case", CASES)
def test_forward_equals_the_one_written_out(case):
    heads = heads_of(**CASES[case])
    features, embeddings, positions = inputs_of(heads, seq=4)
    found = heads(heads.fuse(features), embeddings, position_ids=positions)
    for row in range(2):
        inputs = features[row].double(), embeddings[row].double(), positions[row].tolist()
        assert torch.allclose(
            found[row].double(), plain_forward(heads, *inputs), atol=CLOSE, rtol=0
        )


@pytest.mark.parametrize("case", ["eagle", "eagle3 grouped", "three layers"])
@pytest.mark.parametrize("pieces", [(1, 1, 1, 1, 1), (3, 1, 1), (2, 3)])
def test_cache_fed_in_pieces_equals_one_pass(case, pieces):
    heads = heads_of(**CASES[case])
    features, embeddings, positions = inputs_of(heads)
    hidden = heads.fuse(features)
    whole = heads(hidden, embeddings, position_ids=positions)
    cache, found = DynamicCache(), []
    assert isinstance(cache, KeyValueStore)
    parts = [tensor.split(pieces, dim=1) for tensor in (hidden, embeddings, positions)]
    for part, embedded, places in zip(*parts, strict=True):
        found.append(heads(part, embedded, position_ids=places, past_key_values=cache))
    assert is_close(torch.cat(found, dim=1), whole)
    assert cache.get_seq_length() == 5


@pytest.mark.parametrize("case", ["eagle", "eagle3 grouped"])
def test_masks_hide_padding_and_siblings_in_either_form(case):
    heads = heads_of(**CASES[case])
    features, embeddings, _ = inputs_of(heads, batch=1, seq=3)
    hidden = heads.fuse(features)

    def path(*slots):
        places = torch.arange(len(slots))[None]
        return heads(hidden[:, slots], embeddings[:, slots], position_ids=places)[:, -1]

    sees = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1]], dtype=torch.bool)
    order = [0, 0, 1, 2]  # no other sees slot 1; slots 2 and 3 are siblings
    for mask in (sees, torch.where(sees, 0.0, -math.inf).double()):
        found = heads(
            hidden[:, order],
            embeddings[:, order],
            position_ids=torch.tensor([[0, 7, 1, 1]]),
            attention_mask=mask[None, None],
        )
        assert is_close(found[:, 2], path(0, 1))
        assert is_close(found[:, 3], path(0, 2))


def test_logits_are_those_of_the_own_or_the_targets_matrix():
    target = torch.nn.Linear(HIDDEN, VOCAB, bias=False).requires_grad_(False)
    hidden = torch.randn(2, 3, HIDDEN)
    assert torch.equal(heads_of().logits(hidden, lm_head=target), target(hidden))
    own = heads_of(has_own_lm_head=True)
    assert torch.equal(own.logits(hidden, lm_head=target), own.lm_head(hidden))
    heads = heads_of(**EAGLE3)
    normal = torch.stack([normed(heads.state_dict(), "norm", x, 1e-2) for x in hidden[0]])
    found = heads.logits(hidden[0], lm_head=target)
    assert is_close(found, normal @ heads.lm_head.weight.T)
    shared = heads_of(**{**EAGLE3, "draft_vocab_size": VOCAB, "has_own_lm_head": False})
    normal = torch.stack([normed(shared.state_dict(), "norm", x, 1e-2) for x in hidden[0]])
    assert torch.allclose(
        shared.logits(hidden[0], lm_head=target), target(normal), atol=CLOSE, rtol=0
    )


def test_normed_outputs_are_not_normed_again_and_logits_may_be_scaled():
    hidden = torch.randn(3, HIDDEN)
    heads = heads_of(**EAGLE3, norm_output=True, logit_scale=0.25)
    found = heads.logits(hidden, lm_head=torch.nn.Identity())
    assert torch.equal(found, heads.lm_head(hidden) * 0.25)


def test_embeddings_are_the_own_or_the_targets():
    target = torch.nn.Embedding(VOCAB, HIDDEN).requires_grad_(False)
    tokens = torch.tensor([[4, 12]])
    assert torch.equal(heads_of().embed(tokens, embedding=target), target(tokens))
    heads = heads_of(has_own_embeddings=True)
    assert torch.equal(
        heads.embed(tokens, embedding=target), heads.state_dict()["embed_tokens.weight"][tokens]
    )


def test_draft_tokens_are_mapped_to_the_targets():
    heads = heads_of(**EAGLE3)
    heads.set_draft_columns_(torch.tensor([0, 3, 4, 9, 12]))
    assert heads.target_ids(torch.tensor([[4, 1], [2, 0]])).tolist() == [[12, 3], [4, 0]]
    assert heads.draft_columns.tolist() == [0, 3, 4, 9, 12]
    same = heads_of()
    assert same.draft_columns is None
    assert same.target_ids(torch.tensor([7])).tolist() == [7]
    assert "draft_columns" in heads.state_dict()
    assert "draft_columns" not in same.state_dict()


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ([0, 1, 2, 3], r"columns are 4, expected draft_vocab_size, 5"),
        ([0, 3, 3, 4, 5], r"increasing ids below 13.*sort them"),
        ([0, 3, 4, 5, 13], r"run from 0 to 13.*below 13"),
        ([-1, 3, 4, 5, 6], r"run from -1"),
    ],
)
def test_columns_that_are_no_vocabulary_are_refused(columns, words):
    with pytest.raises(OptionError, match=words):
        heads_of(**EAGLE3).set_draft_columns_(torch.tensor(columns))
    with pytest.raises(OptionError, match=r"another draft_vocab_size"):
        heads_of().set_draft_columns_(torch.arange(5))


def test_casts_leave_the_rotation_exact():
    heads = heads_of()
    before = heads.rotary.inv_freq.clone()
    heads.to(torch.bfloat16)
    assert heads.dtype == torch.bfloat16
    assert torch.equal(heads.rotary.inv_freq, before)
    features, embeddings, positions = inputs_of(heads)
    assert heads(features, embeddings, position_ids=positions).dtype == torch.bfloat16
    assert not any("rotary" in name for name in heads.state_dict())


def test_scaled_rotation_is_that_of_transformers():
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }
    heads = heads_of(rope_parameters=rope, head_dim=8)
    llama = LlamaConfig(
        hidden_size=16, num_attention_heads=2, max_position_embeddings=2048, rope_parameters=rope
    )
    assert torch.equal(heads.rotary.inv_freq, LlamaRotaryEmbedding(llama).inv_freq)


def test_gradients_reach_all_parameters_also_through_a_cache():
    heads = heads_of(**EAGLE3, fc_norm=True, num_layers=2).requires_grad_(True)
    features, embeddings, positions = inputs_of(heads)
    cache, hidden = DynamicCache(), heads.fuse(features)
    for step in range(2):
        hidden = heads(hidden, embeddings, position_ids=positions + step, past_key_values=cache)
    heads.logits(hidden, lm_head=torch.nn.Identity()).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in heads.parameters())


def test_fresh_heads_draw_nothing_and_start_as_told():
    before = torch.get_rng_state()
    heads = EagleHeads(EagleConfig(**EAGLE3, has_own_embeddings=True, fc_bias=True))
    assert heads.draft_columns.tolist() == [0, 1, 2, 3, 4]
    assert all(p.eq(1.0 if "norm" in n else 0.0).all() for n, p in heads.named_parameters())
    heads.set_draft_columns_(torch.tensor([0, 3, 4, 9, 12]))
    lm_weight, embeddings = torch.arange(2.0 * VOCAB * HIDDEN).view(2, VOCAB, HIDDEN)
    heads.init_weights_(
        lm_weight=lm_weight, embeddings=embeddings, generator=torch.Generator().manual_seed(5)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(heads.lm_head.weight, lm_weight[[0, 3, 4, 9, 12]])
    assert torch.equal(heads.embed_tokens.weight, embeddings)
    assert 0 < heads.fc.weight.std() < 0.05
    assert not heads.fc.bias.any()
    assert heads.norm.weight.eq(1).all()
    again = EagleHeads(EagleConfig(**EAGLE3, has_own_embeddings=True, fc_bias=True))
    again.init_weights_(generator=torch.Generator().manual_seed(5))
    assert torch.equal(again.fc.weight, heads.fc.weight)


def test_heads_on_the_meta_device_hold_nothing_until_loaded():
    state = heads_of(**EAGLE3).state_dict()
    heads = EagleHeads(EagleConfig(**EAGLE3), device=torch.device("meta"), dtype=torch.float16)
    assert heads.fc.weight.is_meta
    assert heads.dtype == torch.float16
    heads.load_state_dict(state, assign=True)
    features, embeddings, positions = inputs_of(heads)
    found = heads.to("cpu")(heads.fuse(features), embeddings, position_ids=positions)
    assert found.isfinite().all()


@pytest.mark.parametrize("numbers", [{}, EAGLE3])
def test_heads_come_back_from_their_checkpoint(numbers):
    heads = heads_of(**numbers)
    made = eagle_checkpoint(heads, base_name_or_path="org/base")
    assert (made.config, made.base_name_or_path) == (heads.config, "org/base")
    assert not any(tensor.requires_grad for tensor in made.tensors.values())
    rebuilt, state = build_eagle(made).state_dict(), heads.state_dict()
    assert rebuilt.keys() == state.keys()
    assert all(torch.equal(rebuilt[name], state[name]) for name in state)
