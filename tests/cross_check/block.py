"""Compare our block heads with the draft classes of speculators, SpecForge and vLLM.

speculators saves heads with random weights as its trainer does; we convert them to its format,
where that can hold them, and it loads them again. SpecForge and vLLM load heads that we convert for
them, vLLM also from the format of speculators. All compute the states and logits of blocks within a
text from the same features and tokens. Runs where these libraries are installed, in an environment
of its own:

    make cross-check
"""

import json
import sys
import tempfile
import warnings
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, Qwen3Config
from transformers.utils import logging
from vllm_code import aux_layers, build, config_class, vllm, weights

from speclm.methods.block.checkpoint import block_checkpoint, build_block, read_block, write_block
from speclm.methods.block.checkpoint_formats import HOLDS, unusual_parts
from speclm.methods.block.config import BlockConfig
from speclm.methods.block.network import BlockHeads, block_masks
from speclm.model.exporting import convert_heads

# Of the largest value: float32 sums in another order.
TOLERANCE = 1e-5
HIDDEN, VOCAB, DRAFTED = 64, 512, 128
LENGTH, BLOCK = 40, 6
LAYERS = (2, 5, 9)  # indices of hidden states
SIZES: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": VOCAB,
    "max_position_embeddings": 128,
}
# speculators trains with windows that all positions of a block share, from its anchor on; engines,
# SpecForge and we count from each position. Here the window is wider than the text.
WINDOW = {
    "layer_types": ["sliding_attention", "full_attention"],
    "use_sliding_window": True,
    "sliding_window": 64,
}
CASES: dict[str, dict[str, Any]] = {
    "dflash": {},
    "dflash, all tokens": {"draft_vocab_size": VOCAB},
    "dflash, window": {"layers": WINDOW},
    "dflash, window both ways": {"layers": WINDOW, "sliding_window_non_causal": True},
    "dflash, head_dim 32": {"layers": {"head_dim": 32}},
    "dflash, linear rope": {
        "layers": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}
    },
    "dspark": {"markov_rank": 8},
    "dspark, gated": {"markov_rank": 8, "markov_head_type": "gated"},
    "dspark, rnn": {"markov_rank": 8, "markov_head_type": "rnn"},
    "dspark, in place": {"markov_rank": 8, "sample_from_anchor": False},
    "dspark, confidence of the state": {"markov_rank": 8, "confidence_head_with_markov": False},
}
SPECFORGE_CASES: dict[str, dict[str, Any]] = {
    "dflash": {},
    "jetspec": {"is_causal": (True, True)},
    "window": {"windows": (9, None), "is_causal": (True, False)},
    "rms_norm_eps 1e-3": {"rms_norm_eps": 1e-3},
}
_PART = {"draft_vocab_size": DRAFTED}
_SLIDING = {"windows": (9, None), "is_causal": (True, False)}
VLLM_CASES: dict[str, dict[str, Any]] = {
    "dflash": {"kind": "dflash"},
    "jetspec": {"kind": "jetspec"},
    "dflash, causal windows": {"kind": "dflash", **_SLIDING},
    "dflash, windows both ways": {"kind": "dflash", **_SLIDING, "is_causal": (False, False)},
    "dflash, part of the vocabulary": {"kind": "dflash", **_PART},
    "dflash, rms_norm_eps 1e-3": {"kind": "dflash", "rms_norm_eps": 1e-3},
    "dspark": {"kind": "dspark"},
    "dspark, not causal": {"kind": "dspark", "is_causal": (False, False)},
    "dspark, in place": {"kind": "dspark", "predicts_next": False},
    "dspark, part of the vocabulary": {"kind": "dspark", **_PART},
    "dspark, no confidence": {"kind": "dspark", "has_confidence": False},
}
ANCHOR = 31


def draw_(module: torch.nn.Module) -> None:
    """Give heads weights of which every one matters."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            scale = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.2
            parameter.copy_(drawn * scale + (1 if "norm" in name else 0))


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Return features, tokens and embeddings of a text."""
    generator = torch.Generator().manual_seed(2)
    features = torch.randn(1, LENGTH, len(LAYERS) * HIDDEN, generator=generator)
    tokens = torch.randint(VOCAB, (1, LENGTH), generator=generator)
    return features, tokens, torch.randn(VOCAB, HIDDEN, generator=generator)


def ours(
    heads: BlockHeads, features: Tensor, tokens: Tensor, table: Tensor, anchors: Tensor
) -> dict[str, Tensor]:
    """Return states, logits and confidences of blocks in a text, with its own tokens."""
    config, positions = heads.config, torch.arange(LENGTH)[None]
    keys, values = heads.context(features, heads.rotation(positions))
    block = (anchors[:, :, None] + torch.arange(BLOCK)).flatten(1)
    embeds = heads.embed_blocks(
        tokens.gather(1, anchors), num_positions=BLOCK, embedding=lambda ids: table[ids]
    )
    masks = block_masks(
        config,
        positions[:, None] < anchors[:, :, None],
        context_positions=positions,
        anchors=anchors,
        num_positions=BLOCK,
    )
    num_blocks = anchors.shape[1]
    rotation = heads.rotation(block)
    hidden = heads(embeds, rotation, keys, values, masks, num_blocks=num_blocks)[0]
    logits = heads.logits(hidden, lm_head=lambda states: states @ table.T)
    found = {"hidden": hidden}
    # The token before the one that is drafted.
    previous = tokens[0, block[0]].view(num_blocks, BLOCK)[:, : config.num_drafts]
    if heads.markov_head is not None:
        state, terms = None, []
        by_block = hidden.view(num_blocks, config.num_drafts, -1)
        for index in range(config.num_drafts):
            code, state = heads.markov_head.code(previous[:, index], by_block[:, index], state)
            term = heads.markov_head.markov_w2(code)
            terms.append(term)
        logits = logits + torch.stack(terms, 1).flatten(0, 1)
    if heads.confidence_head is not None:
        found["confidence"] = heads.confidence(hidden, previous.flatten())
    return {**found, "logits": logits}


def of_speculators(case: str, place: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Save heads with speculators, and compute with its class and with ours."""
    from speculators.config import SpeculatorsConfig, VerifierConfig
    from speculators.models.dflash import DFlashDraftModel, DFlashSpeculatorConfig
    from speculators.models.dspark import DSparkDraftModel, DSparkSpeculatorConfig
    from speculators.proposals.greedy import GreedyTokenProposalConfig

    changes = dict(CASES[case])
    is_dspark = case.startswith("dspark")
    layers = Qwen3Config(**{**SIZES, **changes.pop("layers", {})}, tie_word_embeddings=False)
    layers._attn_implementation = "eager"
    kind = DSparkSpeculatorConfig if is_dspark else DFlashSpeculatorConfig
    num_drafts = BLOCK if changes.get("sample_from_anchor", is_dspark) else BLOCK - 1
    config = kind(
        **{"draft_vocab_size": DRAFTED, **changes},
        transformer_layer_config=layers,
        block_size=BLOCK,
        aux_hidden_state_layer_ids=list(LAYERS),
        mask_token_id=VOCAB - 1,
        speculators_config=SpeculatorsConfig(
            algorithm="dspark" if is_dspark else "dflash",
            proposal_methods=[GreedyTokenProposalConfig(speculative_tokens=num_drafts)],
            default_proposal_method="greedy",
            verifier=VerifierConfig(name_or_path=None, architectures=["Qwen3ForCausalLM"]),
        ),
    )
    model = (DSparkDraftModel if is_dspark else DFlashDraftModel)(config).eval()
    features, tokens, table = inputs()
    draw_(model)
    with torch.no_grad():
        model.embed_tokens.weight.copy_(table)
        if model.use_draft_vocab:
            columns = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(3))[:DRAFTED]
            is_drafted = torch.zeros(VOCAB, dtype=torch.bool)
            is_drafted[columns] = True
            model.load_vocab_mappings(is_drafted, columns.sort().values - torch.arange(DRAFTED))
        else:
            model.lm_head.weight.copy_(table)
    model.save_pretrained(place / "saved")
    folder, unusual = place / "saved", unusual_parts(read_block(place / "saved").config)
    if unusual <= HOLDS["speculators"]:
        folder = place / "ours"
        convert_heads(place / "saved", folder, to="speculators")
        model = load_again(model, kind.from_pretrained(folder), folder)
    mask, documents = torch.ones(1, LENGTH), torch.zeros(1, LENGTH, dtype=torch.long)
    with torch.no_grad():
        hidden, logits, *_, indices = model._backbone_forward(
            features, tokens, mask, torch.zeros(1, LENGTH, HIDDEN), documents, max_anchors=7
        )
    anchors = indices.view(-1, BLOCK)[:, 0][None]
    by_block = hidden.view(len(anchors[0]), BLOCK, -1)
    found = {"hidden": by_block, "logits": logits.view(*by_block.shape[:2], -1)}
    texts = tokens[0, indices].view(-1, BLOCK)
    if is_dspark:
        previous = texts
        if not config.sample_from_anchor:
            previous = torch.cat([texts[:, :1], texts[:, :-1]], 1)
        with torch.no_grad():
            embedded = model.markov_head.prev_embeddings(previous)
            # Its recurrent state starts at the anchor's position; that of the first draft is ours.
            first = BLOCK - num_drafts if config.markov_head_type == "rnn" else 0
            term = model.markov_head.block_bias(
                prev_token_ids=previous[:, first:], hidden_states=by_block[:, first:]
            )
            found["logits"] = found["logits"][:, first:] + term
            if model.config.confidence_head_with_markov:
                joined = torch.cat((by_block, embedded), -1)
            else:
                joined = by_block
            found["confidence"] = model.confidence_head(joined).view(-1, BLOCK).sigmoid()
    theirs = {name: t[:, -num_drafts:].flatten(0, 1) for name, t in found.items()}
    heads = build_block(read_block(folder))
    with torch.no_grad():
        return ours(heads, features, tokens, table, anchors), theirs


def load_again(saved: Any, config: Any, folder: Path) -> Any:
    """Return a class of speculators with the weights of a folder, which are those of another."""
    config.transformer_layer_config._attn_implementation = "eager"
    model, state = type(saved)(config).eval(), load_file(folder / "model.safetensors")
    left = model.load_state_dict(state, strict=False)
    of_base = {"embed_tokens.weight", "lm_head.weight", "verifier_lm_head.weight"}
    assert {*left.missing_keys} <= of_base | {"verifier_norm.weight"}, left.missing_keys
    assert not left.unexpected_keys, left.unexpected_keys
    expected = saved.state_dict()
    for key, tensor in state.items():
        width = expected[key].shape[-1]  # a confidence that reads no token gets zeros for it
        assert torch.equal(tensor[..., :width], expected[key])
        assert not tensor[..., width:].any()
    for name in of_base & expected.keys():
        model.get_parameter(name).data.copy_(expected[name])
    return model


def of_specforge(case: str, place: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Write heads, and compute with SpecForge's class and with ours."""
    from specforge.modeling.draft.dflash import DFlashDraftModel

    config = BlockConfig.from_model_config(
        Qwen3Config(**{**SIZES, "num_hidden_layers": 12}),
        kind="dflash",
        block_size=BLOCK,
        feature_layers=LAYERS,
        **SPECFORGE_CASES[case],
    )
    heads = BlockHeads(config).eval()
    draw_(heads)
    write_block(place / "saved", block_checkpoint(heads), num_target_layers=12)
    folder = place / "saved"
    if unusual_parts(config) <= HOLDS["specforge"]:  # its training has masks of its own
        folder = place / "ours"
        convert_heads(place / "saved", folder, to="specforge")
    model = DFlashDraftModel.from_pretrained(folder, attn_implementation="eager").eval()
    assert model.block_size == BLOCK
    assert tuple(model.target_layer_ids) == tuple(layer - 1 for layer in LAYERS)
    assert model.mask_token_id == config.mask_token_id
    features, tokens, table = inputs()
    anchor = torch.tensor([[31]])
    block = torch.full((1, BLOCK), config.mask_token_id)
    block[:, 0] = tokens[:, 31]
    with torch.no_grad():
        masks = block_masks(
            config,
            torch.ones(1, 1, 31, dtype=torch.bool),
            context_positions=torch.arange(31)[None],
            anchors=anchor,
            num_positions=BLOCK,
        )
        by_kind = dict(zip(model.layer_types, masks, strict=True))
        smallest = torch.finfo(torch.float32).min
        hidden = model(
            position_ids=torch.arange(31 + BLOCK)[None],
            attention_mask={k: torch.where(mask, 0.0, smallest) for k, mask in by_kind.items()},
            noise_embedding=table[block],
            target_hidden=features[:, :31],
        )
        found = ours(build_block(read_block(folder)), features, tokens, table, anchor)
    return {"hidden": found["hidden"]}, {"hidden": hidden[0, 1:]}


def of_vllm(case: str, place: Path, to: str = "vllm") -> tuple[dict[str, Tensor], ...] | None:
    """Write heads, and compute with vLLM's classes and with ours; None if they are refused."""
    base = Qwen3Config(**{**SIZES, "num_hidden_layers": 12})
    config = BlockConfig.from_model_config(
        base, block_size=BLOCK, feature_layers=LAYERS, **VLLM_CASES[case]
    )
    if not unusual_parts(config) <= HOLDS[to]:
        return None
    heads = BlockHeads(config).eval()
    draw_(heads)
    if config.has_draft_vocab:
        columns = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(3))[:DRAFTED]
        heads.set_draft_columns_(columns.sort().values)
    write_block(place / "saved", block_checkpoint(heads), num_target_layers=12)
    convert_heads(place / "saved", place / "out", to=to)
    found = ours(
        build_block(read_block(place / "out")), *inputs(), anchors=torch.tensor([[ANCHOR]])
    )
    with vllm("0.33.0"), torch.no_grad():
        return found, by_vllm(place / "out", config)


def by_vllm(folder: Path, config: BlockConfig) -> dict[str, Tensor]:
    """Compute a block with vLLM's draft class, as its runner calls it."""
    method = "dspark" if config.markov else "dflash"
    described: Any
    if "speculators_model_type" in json.loads((folder / "config.json").read_text()):
        own = config_class("speculators.base", "SpeculatorsConfig")
        stated = own.extract_vllm_speculative_config(own.get_config_dict(folder)[0])
        assert stated == {"method": method, "num_speculative_tokens": config.num_drafts}, stated
        described = own.from_pretrained(folder)
        described.standardize_rope_params()
    else:
        described = AutoConfig.from_pretrained(folder)
        if method == "dflash":
            own = config_class("eagle", "EAGLEConfig")
            described = own(described, method=method, model_type="eagle")
    module, name = _OF_VLLM[described.architectures[0]]
    model = build(module, name, described, num_layers=12, vocab_size=VOCAB)
    assert aux_layers(described) == LAYERS
    model.load_weights(weights(folder))
    features, tokens, table = inputs()
    if not getattr(model, "has_own_embed_tokens", False):
        model.model.embed_tokens.weight.data.copy_(table)
    if not getattr(model, "has_own_lm_head", False):
        model.lm_head.weight.data.copy_(table)
    for layer in model.model.layers:
        layer.self_attn.attn.is_causal = layer.self_attn.causal
    states = model.combine_hidden_states(features[0, :ANCHOR])
    places = torch.arange(ANCHOR)
    model.precompute_and_store_context_kv(states, places, places)
    assert model.model.mask_token_id == config.mask_token_id
    block = torch.full((BLOCK,), config.mask_token_id)
    block[0] = tokens[0, ANCHOR]
    hidden = model(block, ANCHOR + torch.arange(BLOCK))[-config.num_drafts :]
    if method == "dflash":
        logits = model.compute_logits(hidden)
        return {"hidden": hidden, "logits": logits[:, logits[0] > float("-inf")]}
    code = model.markov_embed(tokens[0, ANCHOR:][: config.num_drafts])
    found = {
        "hidden": hidden,
        "logits": model.compute_draft_logits(hidden) + model.markov_bias(code),
    }
    if config.has_confidence:
        found["confidence"] = model.compute_confidence(hidden, code)
    return found


_OF_VLLM = {  # its registry
    "DFlashDraftModel": ("qwen3_dflash", "DFlashQwen3ForCausalLM"),
    "Qwen3DSparkModel": ("qwen3_dspark", "Qwen3DSparkForCausalLM"),
}


def main() -> int:
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    libraries = ("speculators", "SpecForge")
    print(json.dumps({name: version(name.lower()) for name in (*libraries, "transformers")}))
    failed = 0
    of_servers = partial(of_vllm, to="speculators")
    for library, compare, cases in (
        (libraries[0], of_speculators, CASES),
        (libraries[1], of_specforge, SPECFORGE_CASES),
        ("vLLM", of_vllm, VLLM_CASES),
        ("vLLM, speculators' format", of_servers, VLLM_CASES),
    ):
        for case in cases:
            with tempfile.TemporaryDirectory() as place:
                compared = compare(case, Path(place))
            if compared is None:
                print(f"{library:26s} {case:32s} refused", flush=True)
                continue
            mine, theirs = compared
            assert mine.keys() == theirs.keys()
            found = max(
                float((mine[name] - theirs[name]).abs().max() / theirs[name].abs().max())
                for name in theirs
            )
            is_close = found <= TOLERANCE  # not so where it is no number
            failed += not is_close
            mark = "ok" if is_close else "DIFFERS"
            print(f"{library:26s} {case:32s} {found:.1e} {mark}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
