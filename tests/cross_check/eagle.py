"""Compare our EAGLE-3 heads with the draft classes of SpecForge and speculators.

Heads with random weights are written into a folder, the other library loads it in its own way,
and both compute logits of the same features and tokens. speculators also feeds outputs back, as
its training does; so do we. Runs where these libraries are installed, in an environment of its own:

    make cross-check
"""

import contextlib
import io
import json
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from speclm.methods.eagle.checkpoint import eagle_checkpoint, read_eagle, write_eagle
from speclm.methods.eagle.config import EagleConfig
from speclm.methods.eagle.network import EagleHeads, build_eagle
from speclm.methods.eagle.rollout import roll_out

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
    "wider base": {"target_hidden_size": 96, "has_own_embeddings": True},
}
# What a library's draft class cannot be, by its own code.
UNSUPPORTED = {
    "SpecForge": {"norm_before_fc", "norm_before_residual"},
    "speculators": {"wider base"},
}

Loader = Callable[[Path, Path, EagleConfig], Callable[[Tensor, Tensor, Tensor], list[Tensor]]]
"""Returns a library's map from features, tokens and embeddings to the logits of its steps."""


def specforge(folder: Path, _base: Path, config: EagleConfig) -> Callable[..., list[Tensor]]:
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


def speculators(folder: Path, base: Path, config: EagleConfig) -> Callable[..., list[Tensor]]:
    """Load heads into speculators' class, after its own conversion to its format."""
    from speculators.convert import convert_model
    from speculators.models.eagle3 import Eagle3DraftModel, Eagle3SpeculatorConfig

    converted = folder.with_name(f"{folder.name}-converted")
    convert_model(
        str(folder),
        str(base),
        "eagle3",
        str(converted),
        validate_device="cpu",
        norm_before_residual=config.norm_before_residual,  # it does not read the config's
    )
    described = Eagle3SpeculatorConfig.from_pretrained(converted)
    described.transformer_layer_config._attn_implementation = "eager"
    state = {k.replace("midlayer.", "layers.0."): t for k, t in read_all(folder).items()}
    for key, tensor in read_all(converted).items():
        assert torch.equal(tensor, state[key]), f"{key} was converted to something else"
    model = Eagle3DraftModel(described)
    found = model.load_state_dict(state, strict=False)  # the conversion drops norms of features
    of_base = {"embed_tokens.weight", "verifier_lm_head.weight", "verifier_norm.weight"}
    lists = set() if config.has_draft_vocab else {"d2t", "t2d"}
    left = {*found.missing_keys} - of_base, {*found.unexpected_keys} - lists
    assert not any(left), f"missing and unexpected: {left}"
    model.eval()

    def logits(features: Tensor, tokens: Tensor, table: Tensor) -> list[Tensor]:
        steps: list[Tensor] = []
        model.embed_tokens.weight.data.copy_(table)
        hook = model.lm_head.register_forward_hook(lambda *call: steps.append(call[2]))
        model(features, tokens, document_ids=torch.zeros_like(tokens), ttt_steps=NUM_STEPS)
        hook.remove()
        return steps

    return logits


LIBRARIES: dict[str, Loader] = {"SpecForge": specforge, "speculators": speculators}


def read_all(folder: Path) -> dict[str, Tensor]:
    """Return all tensors of a folder's weights."""
    from safetensors.torch import load_file

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


@torch.no_grad()
def difference(library: str, case: str, *, place: Path, base: Path) -> float:
    """Return the largest difference of a logit, relative to the largest one."""
    config = EagleConfig.from_model_config(BASE, kind="eagle3", draft_vocab_size=128)
    config = replace(config, **CASES[case])
    heads, folder = random_heads(config), place / f"{library}-{case}".replace(" ", "-")
    write_eagle(folder, eagle_checkpoint(heads), num_target_layers=NUM_LAYERS)
    generator = torch.Generator().manual_seed(2)
    width = config.num_features * config.target_hidden_size
    features = torch.randn(1, LENGTH + 1, width, generator=generator)
    tokens = torch.randperm(config.vocab_size, generator=generator)[None, : LENGTH + 1]
    table = torch.randn(config.vocab_size, config.hidden_size, generator=generator)
    ours = build_eagle(read_eagle(folder))
    slots = torch.arange(LENGTH)[None]
    outputs = roll_out(
        ours, features, tokens, slots, num_steps=NUM_STEPS, embedding=lambda ids: table[ids]
    )
    expected = [ours.logits(hidden, lm_head=torch.nn.Identity()) for hidden in outputs]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        theirs = LIBRARIES[library](folder, base, config)
        found = theirs(features[:, :-1], tokens[:, 1:], table)
    return max(
        float((logits - mine)[:, : LENGTH - step].abs().max() / mine.abs().max())
        for step, (logits, mine) in enumerate(zip(found, expected, strict=False))
    )


def main() -> int:
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    print(json.dumps({name: version(name.lower()) for name in (*LIBRARIES, "transformers")}))
    failed = 0
    with tempfile.TemporaryDirectory() as place:
        base = Path(place, "base")
        LlamaForCausalLM(BASE).save_pretrained(base)
        for library in LIBRARIES:
            for case in (name for name in CASES if name not in UNSUPPORTED[library]):
                found = difference(library, case, place=Path(place), base=base)
                is_close = found <= TOLERANCE  # not so where it is no number
                failed += not is_close
                mark = "ok" if is_close else "DIFFERS"
                print(f"{library:12s} {case:22s} {found:.1e} {mark}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
