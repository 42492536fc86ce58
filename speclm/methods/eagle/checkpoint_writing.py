"""What the formats of EAGLE heads share: how heads are read, described and packed."""

from collections.abc import Mapping
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from speclm.cards import HeadsCard
from speclm.config import require_options
from speclm.drafting.base_parts import BaseParts
from speclm.drafting.formats import NUM_PROBED, CheckpointFormat, Engine, random_inputs
from speclm.drafting.heads_folder import WEIGHTS_NAME
from speclm.drafting.package import Package
from speclm.methods.eagle.checkpoint import (
    EagleCheckpoint,
    map_name,
    named_tensors,
    read_eagle,
)
from speclm.methods.eagle.checkpoint_config import describe
from speclm.methods.eagle.checkpoint_limits import LIMITS, Fitted, fit
from speclm.methods.eagle.network import build_eagle

_SGLANG = """\
python -m sglang.launch_server --model-path $base --speculative-algorithm METHOD \
--speculative-draft-model-path $heads --speculative-num-steps 3 --speculative-eagle-topk 1 \
--speculative-num-draft-tokens 4"""


class EagleFormat(CheckpointFormat[EagleCheckpoint]):
    """What the formats of EAGLE heads share."""

    @override
    def read(self, folder: Path, **options: Any) -> EagleCheckpoint:
        require_options(options, ("token_map",), owner="files of EAGLE heads")
        return read_eagle(folder, **options)

    @override
    def pack(self, checkpoint: EagleCheckpoint, base: BaseParts | None) -> Package:
        fitted = fit(checkpoint, base, self.name)
        heads = fitted.checkpoint
        tensors = listed(heads) if self.name == "vllm" else named_tensors(heads)
        return package_of(fitted, described_for(self.name, heads), tensors)

    @override
    def logits(
        self, checkpoint: EagleCheckpoint, *, embeddings: Tensor | None, lm_weight: Tensor | None
    ) -> Tensor:
        heads, config = build_eagle(checkpoint, dtype=torch.float32), checkpoint.config
        is_eagle3 = config.kind == "eagle3"
        width = config.target_hidden_size * config.num_features if is_eagle3 else config.hidden_size
        matrix = (config.vocab_size, config.hidden_size)
        features, table, output = random_inputs((1, NUM_PROBED, width), matrix, matrix)
        table = table if embeddings is None else embeddings.float()
        output = output if lm_weight is None else lm_weight.float()
        positions = torch.arange(NUM_PROBED, device="cpu")[None]
        with torch.no_grad():
            embedded = heads.embed(positions % config.vocab_size, embedding=lambda ids: table[ids])
            hidden = heads(heads.fuse(features), embedded, position_ids=positions)
            return heads.logits(
                hidden, lm_head=heads.among_drafted(lambda states: states @ output.T)
            )

    @override
    def card(self, checkpoint: EagleCheckpoint) -> HeadsCard:
        from speclm.methods.eagle.method import eagle_card

        return eagle_card(checkpoint)


def package_of(fitted: Fitted, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Package:
    """Return the files of heads that a format can hold."""
    layers = fitted.checkpoint.config.feature_layers
    facts = {} if layers is None else {"feature_layers": list(layers)}
    return Package(config, {WEIGHTS_NAME: tensors}, notes=fitted.notes, facts=facts)


def described_for(name: str, checkpoint: EagleCheckpoint) -> dict[str, Any]:
    """Return the usual config, with the hidden states counted as the software counts them."""
    config = checkpoint.config
    if config.feature_layers is not None:
        first = LIMITS[name][config.kind].ids_from
        config = replace(config, feature_layers=tuple(i + first for i in config.feature_layers))
    base = checkpoint.base_name_or_path
    return describe(config, dtype=checkpoint.dtype, base_name_or_path=base, choices=None)


def in_layers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors with the first layer named as the others are."""
    return {key.replace("midlayer.", "layers.0."): tensor for key, tensor in tensors.items()}


def listed(checkpoint: EagleCheckpoint) -> dict[str, Tensor]:
    """Return named tensors, with lists of tokens only where these are a part of the vocabulary.

    vLLM refuses lists of the whole vocabulary.
    """
    named = named_tensors(checkpoint)
    lists = () if checkpoint.config.has_draft_vocab else ("d2t", "t2d")
    return {key: tensor for key, tensor in named.items() if key not in lists}


def sglang_engine(checkpoint: EagleCheckpoint) -> Engine:
    """Return SGLang with the command that serves heads."""
    config = checkpoint.config
    command = _SGLANG.replace("METHOD", "EAGLE3" if config.kind == "eagle3" else "EAGLE")
    if config.kind == "eagle" and config.has_draft_vocab:
        command += f" --speculative-token-map $heads/{map_name(config.draft_vocab_size)}"
    return Engine("SGLang", "0.5.23, the newest that was checked", command)


def with_token_map(package: Package, checkpoint: EagleCheckpoint) -> Package:
    """Return the files of EAGLE-1 heads with those tokens that they draft in FR-Spec's token map.

    Source: Zhao et al. 2025 (FR-Spec) and SGLang's code.
    """
    if not checkpoint.config.has_draft_vocab:
        return package
    ids: list[int] = checkpoint.tensors["draft_columns"].tolist()
    content = BytesIO()
    torch.save(ids, content)
    tensors = {
        key: tensor
        for key, tensor in package.weights[WEIGHTS_NAME].items()
        if key not in ("d2t", "t2d")
    }
    files = {map_name(len(ids)): content.getvalue()}
    return replace(package, weights={WEIGHTS_NAME: tensors}, files=files)
