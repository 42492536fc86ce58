"""EAGLE heads are found in folders and on the hub, whatever their config says."""

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file
from torch import Tensor

from speclm import SpecModel
from speclm.drafting.combined import CombinedProposer
from speclm.errors import CheckpointError, OptionError
from speclm.methods.eagle.proposer import EagleProposer
from speclm.model.checking import check_heads
from speclm.model.exporting import convert_heads
from tests.model.hub import running_hub
from tests.models import VOCAB_SIZE, build_model, generate, prompts

HIDDEN, HEADS, INNER, DRAFTED = 40, 4, 48, 40
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "num_hidden_layers": 1,
    "intermediate_size": INNER,
    "vocab_size": VOCAB_SIZE,
    "rms_norm_eps": 1e-6,
}


def numbers(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator) * (0.3 if len(shape) > 1 else 1.0)


def layer(prefix: str, width: int) -> dict[str, Tensor]:
    return {
        f"{prefix}.self_attn.q_proj.weight": numbers(HIDDEN, width),
        f"{prefix}.self_attn.k_proj.weight": numbers(HIDDEN // 2, width),
        f"{prefix}.self_attn.v_proj.weight": numbers(HIDDEN // 2, width, seed=1),
        f"{prefix}.self_attn.o_proj.weight": numbers(HIDDEN, HIDDEN),
        f"{prefix}.mlp.gate_proj.weight": numbers(INNER, HIDDEN),
        f"{prefix}.mlp.up_proj.weight": numbers(INNER, HIDDEN, seed=1),
        f"{prefix}.mlp.down_proj.weight": numbers(HIDDEN, INNER),
        f"{prefix}.post_attention_layernorm.weight": torch.ones(HIDDEN),
    }


def eagle() -> tuple[dict[str, Tensor], dict[str, object]]:
    tensors = {"fc.weight": numbers(HIDDEN, 2 * HIDDEN), **layer("layers.0", HIDDEN)}
    return tensors, {**LLAMA, "bias": False}


def eagle3() -> tuple[dict[str, Tensor], dict[str, object]]:
    chosen = torch.arange(0, VOCAB_SIZE, VOCAB_SIZE // DRAFTED)
    mask = torch.zeros(VOCAB_SIZE, dtype=torch.bool)
    mask[chosen] = True
    norms = ("midlayer.input_layernorm.weight", "midlayer.hidden_norm.weight", "norm.weight")
    tensors = {
        "fc.weight": numbers(HIDDEN, 3 * HIDDEN),
        **layer("midlayer", 2 * HIDDEN),
        **{name: torch.ones(HIDDEN) for name in norms},
        "lm_head.weight": numbers(DRAFTED, HIDDEN),
        "d2t": chosen - torch.arange(DRAFTED),
        "t2d": mask,
    }
    return tensors, {**LLAMA, "draft_vocab_size": DRAFTED}


KINDS = {"eagle": eagle, "eagle3": eagle3}


def write(folder: Path, kind: str, *, pickled: bool = False, **changes: Tensor | None) -> Path:
    tensors, config = KINDS[kind]()
    tensors = {name: t for name, t in {**tensors, **changes}.items() if t is not None}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if pickled:
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def base():
    return build_model("llama", num_hidden_layers=7, head_dim=10)


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_folder_of_eagle_heads_decodes_the_tokens_of_its_base(base, kind, pickled, tmp_path):
    folder = write(tmp_path, kind, pickled=pickled)
    spec = SpecModel.from_pretrained(base, folder, num_draft_tokens=9, heads_kwargs={"depth": 3})
    assert isinstance(spec.proposer, EagleProposer)
    assert (spec.proposer.config.num_draft_tokens, spec.proposer.config.depth) == (9, 3)
    inputs = prompts(9, 4)
    for settings in ({"do_sample": False}, {"do_sample": True}):
        expected, found = (
            generate(model, inputs, max_new_tokens=10, **settings) for model in (base, spec)
        )
        assert found[0].tolist() == expected[0].tolist()
        assert torch.equal(found[1], expected[1])
    assert spec.last_speculation.fallbacks == []
    assert spec.last_speculation.rows[0].num_draft_tokens > 0


def test_copy_of_the_bases_embeddings_is_shared(base, tmp_path):
    copy = {"embed_tokens.weight": base.get_input_embeddings().weight.detach().clone()}
    spec = SpecModel.from_pretrained(base, write(tmp_path / "copy", "eagle", **copy))
    assert spec.proposer.heads.embed_tokens is None
    own = {"embed_tokens.weight": numbers(VOCAB_SIZE, HIDDEN)}
    spec = SpecModel.from_pretrained(base, write(tmp_path / "own", "eagle", **own))
    assert spec.proposer.heads.embed_tokens is not None


@pytest.mark.parametrize("kind", KINDS)
def test_heads_join_others(base, kind, tmp_path):
    spec = SpecModel.from_pretrained(base, ["ngram", write(tmp_path, kind)])
    assert isinstance(spec.proposer, CombinedProposer)
    inputs = prompts(9, 4)
    settings = {"max_new_tokens": 10, "do_sample": False}
    assert torch.equal(spec.generate(**inputs, **settings), base.generate(**inputs, **settings))


@pytest.mark.parametrize("kind", KINDS)
def test_hub_id_of_eagle_heads_is_downloaded(base, kind, tmp_path, monkeypatch):
    (tmp_path / "org").mkdir()
    write(tmp_path / "org" / "heads", kind, pickled=kind == "eagle")
    torch.save(list(range(50)), tmp_path / "org/heads/freq_50.pt")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with running_hub(tmp_path, monkeypatch) as hub:
        spec = SpecModel.from_pretrained(base, "org/heads")
        weights = "pytorch_model.bin" if kind == "eagle" else "model.safetensors"
        assert {*hub.sent} == {"config.json", weights, "freq_50.pt"}
    assert isinstance(spec.proposer, EagleProposer)
    assert spec.proposer.heads.config.draft_vocab_size == (50 if kind == "eagle" else DRAFTED)


def test_a_token_map_comes_back_from_sglang_with_equal_tokens_and_tau(base, tmp_path):
    folder = write(tmp_path / "heads", "eagle")
    torch.save(list(range(0, VOCAB_SIZE, 2)), folder / "freq_80.pt")
    torch.save([1, 2], folder / "freq_2.pt")
    options = {"token_map": "freq_80.pt"}
    convert_heads(folder, tmp_path / "own", to="speclm", heads_kwargs=options)
    convert_heads(tmp_path / "own", tmp_path / "sglang", to="sglang")
    assert check_heads(tmp_path / "sglang", source=folder, heads_kwargs=options).difference == 0
    inputs, found = prompts(9, 4), []
    for place, given in ((folder, options), (tmp_path / "own", {}), (tmp_path / "sglang", options)):
        spec = SpecModel.from_pretrained(base, place, adaptive=False, heads_kwargs=given)
        assert spec.proposer.heads.lm_head is None
        tokens = spec.generate(**inputs, max_new_tokens=12, do_sample=False)
        found.append((tokens.tolist(), spec.last_speculation.tau))
    assert found[0] == found[1] == found[2]
    whole = SpecModel.from_pretrained(base, folder, heads_kwargs={"token_map": "all"})
    assert not whole.proposer.heads.config.has_draft_vocab


def test_damaged_heads_and_wrong_options_are_refused(base, tmp_path):
    with pytest.raises(CheckpointError, match="d2t"):
        SpecModel.from_pretrained(base, write(tmp_path / "a", "eagle3", d2t=None))
    for name in ("fc.weight", "midlayer.self_attn.q_proj.weight"):
        damaged = write(tmp_path / name, "eagle3", **{name: None})
        named = {**LLAMA, "architectures": ["LlamaForCausalLMEagle3"]}
        (damaged / "config.json").write_text(json.dumps(named))
        with pytest.raises(CheckpointError, match="no file has the keys of EAGLE heads"):
            SpecModel.from_pretrained(base, damaged)
    folder = write(tmp_path / "b", "eagle3")
    with pytest.raises(OptionError, match=r"EAGLE heads: unknown option 'wings'.*'depth'"):
        SpecModel.from_pretrained(base, folder, heads_kwargs={"wings": 0.1})
    with pytest.raises(OptionError, match="dtype of the heads"):
        SpecModel.from_pretrained(base, folder, heads_kwargs={"dtype": torch.int8})
    shallow = build_model("llama", num_hidden_layers=4, head_dim=10)
    with pytest.raises(OptionError, match="expected at least 7"):
        SpecModel.from_pretrained(shallow, folder)
