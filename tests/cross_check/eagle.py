"""Convert EAGLE heads to each format, and compare with the software that the format is for.

Heads with random weights are converted as `speclm convert` does. The other library loads the folder
in its own way, and both compute logits of the same features and tokens. speculators also feeds
outputs back, as its training does; so do we. A format that is too small for some heads must refuse
them. Runs where these libraries are installed, in an environment of its own:

    make cross-check
"""

import contextlib
import importlib
import io
import json
import sys
import sysconfig
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging
from vllm_code import build, config_class, vllm, weights

from speclm.errors import CheckpointError
from speclm.methods.eagle.checkpoint import eagle_checkpoint, read_eagle, write_eagle
from speclm.methods.eagle.checkpoint_limits import LIMITS
from speclm.methods.eagle.config import EagleConfig
from speclm.methods.eagle.network import EagleHeads, build_eagle
from speclm.methods.eagle.rollout import roll_out
from speclm.model.exporting import convert_heads

# Of the largest logit: float32 sums in another order.
TOLERANCE = 1e-5
NUM_LAYERS = 12  # of the base; speculators wants to know which three hidden states are read
LENGTH = 24
NUM_STEPS = 3
BASE = LlamaConfig(
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=NUM_LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=512,
    max_position_embeddings=128,
)
LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "all tokens": {"draft_vocab_size": 512},
    "the base's lm head": {"draft_vocab_size": 512, "has_own_lm_head": False},
    "head_dim 32": {"head_dim": 32},
    "rope_theta 500000": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    },
    "linear rope": {"rope_parameters": LINEAR},
    "rms_norm_eps 1e-3": {"rms_norm_eps": 1e-3},
    "fc_norm": {"fc_norm": True},
    "norm_output": {"norm_output": True},
    "norm_before_fc": {"norm_before_fc": True},
    "norm_before_residual": {"norm_before_residual": True},
    "attention biases": {"attention_bias": True, "attention_output_bias": True},
    "biases of q, k, v": {"attention_bias": True},
    "norms of q and k": {"has_qk_norm": True},
    "two layers": {"num_layers": 2},
    "logits doubled": {"logit_scale": 2.0},
    "four hidden states": {"num_features": 4, "feature_layers": (1, 4, 7, 10)},
    "own embeddings": {"has_own_embeddings": True},
    "wider base": {"target_hidden_size": 96, "has_own_embeddings": True},
    "EAGLE-1": {},
    "EAGLE-1, two layers": {"num_layers": 2},
    "EAGLE-1, attention biases": {"attention_bias": True, "attention_output_bias": True},
    "EAGLE-1, biases of q, k, v": {"attention_bias": True},
    "EAGLE-1, bias of the output": {"attention_output_bias": True},
    "EAGLE-1, logits doubled": {"logit_scale": 2.0},
    "EAGLE-1, own embeddings": {"has_own_embeddings": True},
    "EAGLE-1, fc bias": {"fc_bias": True},
}

Loader = Callable[[Path, EagleConfig], Callable[[Tensor, Tensor, Tensor], list[Tensor]]]
"""Returns a library's map from features, tokens and embeddings to the logits of its steps."""


def specforge(folder: Path, config: EagleConfig) -> Callable[..., list[Tensor]]:
    """Load heads as SpecForge starts a training from them; it has one step without its trainer."""
    from specforge.modeling.auto import AutoDraftModel, AutoDraftModelConfig
    from specforge.training.model_loading import warm_start_draft_model

    described = AutoDraftModelConfig.from_file(str(folder / "config.json"))
    model = AutoDraftModel.from_config(described)
    warm_start_draft_model(  # raises if a key is missing or unknown
        model,
        str(folder),
        draft_config=described,
        strategy="eagle3",
        allow_missing_embedding=True,
    )
    model.eval()

    def logits(features: Tensor, tokens: Tensor, table: Tensor) -> list[Tensor]:
        length = features.shape[1]
        embeddings = model.embed_tokens(tokens) if config.has_own_embeddings else table[tokens]
        mask = model.prepare_decoder_attention_mask(
            attention_mask=torch.ones(1, length, dtype=torch.bool),
            hidden_states=embeddings,
            batch_size=1,
            seq_length=length,
            past_key_values_length=0,
        )
        hidden = model.backbone(
            input_embeds=embeddings,
            hidden_states=model.project_hidden_states(features),
            cache_hidden=None,
            attention_mask=mask,
            position_ids=torch.arange(length)[None],
        )
        return [model.compute_logits(hidden)]

    return logits


def speculators(folder: Path, config: EagleConfig) -> Callable[..., list[Tensor]]:
    """Load heads into speculators' class."""
    from speculators.models.eagle3 import Eagle3DraftModel, Eagle3SpeculatorConfig

    described = Eagle3SpeculatorConfig.from_pretrained(folder)
    described.transformer_layer_config._attn_implementation = "eager"
    assert described.norm_before_residual is config.norm_before_residual
    model = Eagle3DraftModel(described)
    found = model.load_state_dict(read_all(folder), strict=False)
    of_base = {"embed_tokens.weight", "verifier_lm_head.weight", "verifier_norm.weight"}
    lists = set() if config.has_draft_vocab else {"d2t", "t2d"}
    left = {*found.missing_keys} - of_base, {*found.unexpected_keys} - lists
    assert not any(left), f"missing and unexpected: {left}"
    model.eval()

    def logits(features: Tensor, tokens: Tensor, table: Tensor) -> list[Tensor]:
        steps: list[Tensor] = []
        if not config.has_own_embeddings:
            model.embed_tokens.weight.data.copy_(table)
        hook = model.lm_head.register_forward_hook(lambda *call: steps.append(call[2]))
        model(features, tokens, document_ids=torch.zeros_like(tokens), ttt_steps=NUM_STEPS)
        hook.remove()
        return steps

    return logits


def converted(folder: Path, config: EagleConfig) -> Callable[..., list[Tensor]]:
    """Load heads into speculators' class, after its own conversion to its format."""
    from speculators.convert import convert_model

    own = folder.with_name(f"{folder.name}-converted")
    convert_model(
        str(folder),
        str(folder.parent / "base"),
        "eagle3",
        str(own),
        validate_device="cpu",
        norm_before_residual=config.norm_before_residual,  # it does not read the config's
    )
    state = {k.replace("midlayer.", "layers.0."): t for k, t in read_all(folder).items()}
    for key, tensor in read_all(own).items():
        assert torch.equal(tensor, state[key]), f"{key} was converted to something else"
    save_file(state, own / "model.safetensors")  # the conversion drops norms of features
    return speculators(own, config)


def vllm_0_33(folder: Path, config: EagleConfig) -> Callable[..., list[Tensor]]:
    """Load heads as vLLM does, with its config classes, draft classes and loader of weights."""
    with vllm("0.33.0"):
        if "speculators_model_type" in json.loads((folder / "config.json").read_text()):
            own = config_class("speculators.base", "SpeculatorsConfig")
            raw = own.get_config_dict(folder)[0]
            found = own.extract_vllm_speculative_config(raw)
            assert found == {"method": "eagle3", "num_speculative_tokens": 3}, found
            described = own.from_pretrained(folder)
            described.standardize_rope_params()  # as vLLM does with every config that it reads
        else:
            described = config_class("eagle", "EAGLEConfig")(
                AutoConfig.from_pretrained(folder), method=config.kind, model_type="eagle"
            )
        (architecture,) = described.architectures
        module, name = _OF_VLLM[architecture]
        model = build(module, name, described, num_layers=NUM_LAYERS, vocab_size=config.vocab_size)
        model.load_weights(weights(folder))

    def logits(features: Tensor, tokens: Tensor, table: Tensor) -> list[Tensor]:
        if not getattr(model, "has_own_embed_tokens", False):
            model.model.embed_tokens.weight.data.copy_(table)
        if not getattr(model, "has_own_lm_head", False):
            model.lm_head = torch.nn.Linear(*table.shape[::-1], bias=False)
            model.lm_head.weight.copy_(table)
        hidden = features[0]
        if config.kind == "eagle3":
            hidden = model.combine_hidden_states(hidden)
        hidden, _ = model(tokens[0], torch.arange(len(hidden)), hidden)
        compute = getattr(model, "compute_logits", None)
        if compute is None:  # of vLLM's Llama, whose module the class extends
            return [model.logits_processor(model.lm_head, hidden)[None]]
        found = compute(hidden)
        return [found[:, found[0] > float("-inf")][None]]

    return logits


_OF_VLLM = {  # its registry
    "EagleLlamaForCausalLM": ("llama_eagle", "EagleLlamaForCausalLM"),
    "LlamaForCausalLMEagle3": ("llama_eagle3", "Eagle3LlamaForCausalLM"),
    "Eagle3LlamaForCausalLM": ("llama_eagle3", "Eagle3LlamaForCausalLM"),
    "Eagle3Qwen3ForCausalLM": ("qwen3_eagle3", "Eagle3Qwen3ForCausalLM"),
}


def modelopt(folder: Path, config: EagleConfig) -> Callable[..., list[Tensor]]:
    """Check names by ModelOpt's validator; it has no forward without a base, vLLM has."""
    plugins = Path(sysconfig.get_path("purelib"), "modelopt/torch/export/plugins")
    package = ModuleType("modelopt_plugins")
    package.__path__ = [str(plugins)]
    sys.modules[package.__name__] = package
    exporter = importlib.import_module("modelopt_plugins.hf_spec_export").EagleExporter
    given = {"eagle_decoder_type": "llama", "num_hidden_layers": config.num_layers}
    described = json.loads((folder / "config.json").read_text())["eagle_config"]
    model = SimpleNamespace(eagle_config=SimpleNamespace(**described, **given))
    exporter(model)._check_valid_sd(read_all(folder))
    return vllm_0_33(folder, config)


READERS: tuple[tuple[str, str, Loader], ...] = (
    ("SpecForge", "specforge", specforge),
    ("speculators", "speculators", speculators),
    ("speculators' converter", "vllm", converted),
    ("vLLM", "vllm", vllm_0_33),
    ("vLLM", "speculators", vllm_0_33),
    ("vLLM", "sglang", vllm_0_33),
    ("ModelOpt and vLLM", "modelopt", modelopt),
)
# What a reader, or vLLM with a format that is not its own, cannot be by its own code.
_EAGLE1 = {case for case in CASES if case.startswith("EAGLE-1")}
UNSUPPORTED = {
    ("vLLM", "sglang"): _EAGLE1,
    ("speculators", "speculators"): {"wider base"},
    ("speculators' converter", "vllm"): _EAGLE1
    | {"wider base", "logits doubled", "the base's lm head", "norms of q and k"}
    | {"four hidden states"},
}


def read_all(folder: Path) -> dict[str, Tensor]:
    """Return all tensors of a folder's weights."""
    return load_file(folder / "model.safetensors")


def random_heads(config: EagleConfig) -> EagleHeads:
    """Return heads whose every number matters."""
    heads = EagleHeads(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in heads.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            scale = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.2
            parameter.copy_(drawn * scale + (1 if "norm" in name else 0))
    if heads.draft_columns is not None:
        chosen = torch.randperm(config.vocab_size, generator=generator)
        heads.set_draft_columns_(chosen[: config.draft_vocab_size].sort().values)
    return heads.eval()


def config_of(case: str) -> EagleConfig:
    """Return the config of a case."""
    kind = "eagle" if case.startswith("EAGLE-1") else "eagle3"
    drafted = None if kind == "eagle" else CASES[case].get("draft_vocab_size", 128)
    config = EagleConfig.from_model_config(BASE, kind=kind, draft_vocab_size=drafted)
    return replace(config, **CASES[case])


@torch.no_grad()
def difference(folder: Path, load: Loader, config: EagleConfig) -> float:
    """Return the largest difference of a logit, relative to the largest one."""
    ours = build_eagle(read_eagle(folder))
    generator = torch.Generator().manual_seed(2)
    width = config.num_features * config.target_hidden_size
    features = torch.randn(1, LENGTH + 1, width, generator=generator)
    tokens = torch.randperm(config.vocab_size, generator=generator)[None, : LENGTH + 1]
    table = torch.randn(config.vocab_size, config.hidden_size, generator=generator)
    sources = torch.arange(LENGTH)[None]
    outputs = roll_out(
        ours, features, tokens, sources, num_steps=NUM_STEPS, embedding=lambda ids: table[ids]
    )
    expected = [ours.logits(hidden, lm_head=lambda x: x @ table.T) for hidden in outputs]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        found = load(folder, config)(features[:, :-1], tokens[:, 1:], table)
    assert found[0].shape == expected[0].shape
    return max(
        float((logits - mine)[:, : LENGTH - step].abs().max() / mine.abs().max())
        for step, (logits, mine) in enumerate(zip(found, expected, strict=False))
    )


def check(place: Path, case: str, reader: tuple[str, str, Loader]) -> str:
    """Return what a reader makes of a case: the difference, or that the format refuses it."""
    (name, to, load), config = reader, config_of(case)
    folder, limits = place / f"{name}-{to}-{case}".replace(" ", "-"), LIMITS[to].get(config.kind)
    base = place / "base" if config.target_hidden_size == BASE.hidden_size else None
    try:
        convert_heads(place / case, folder, to=to, base=base)
    except CheckpointError as error:
        is_right = limits is None or not limits.hold(config)
        return "refused" if is_right else f"DIFFERS: {error}"
    try:
        found = difference(folder, load, config)
    except Exception as error:  # noqa: BLE001 -- of the other library
        return f"DIFFERS: {type(error).__name__}: {error}"
    # Not close where it is no number.
    return f"{found:.1e} ok" if found <= TOLERANCE else f"{found:.1e} DIFFERS"


def main() -> int:
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    libraries = ("speculators", "SpecForge", "nvidia-modelopt", "transformers")
    print(json.dumps({name: version(name.lower()) for name in libraries} | {"vLLM": "0.33.0"}))
    failed = 0
    with tempfile.TemporaryDirectory() as created:
        place = Path(created)
        LlamaForCausalLM(BASE).save_pretrained(place / "base")
        for case in CASES:
            write_eagle(place / case, eagle_checkpoint(random_heads(config_of(case))))
        for reader in READERS:
            left = UNSUPPORTED.get(reader[:2], set())
            for case in (name for name in CASES if name not in left):
                found = check(place, case, reader)
                failed += "DIFFERS" in found
                print(f"{reader[0]:24s} {reader[1]:12s} {case:28s} {found}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
