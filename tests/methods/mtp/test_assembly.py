"""How MTP layers are built from the classes of the base, and what does not fit it."""

import pytest
import torch

from speclm.errors import CheckpointError, UnsupportedModelError
from speclm.methods.mtp import assembly

ATTENTION, EXPERTS = "model.layers.2.self_attn.", "model.layers.2.mlp.experts."


def test_matrices_that_are_copies_are_the_targets_and_others_are_kept(made, copied):
    head, embeddings = made.base.lm_head.weight, made.base.get_input_embeddings().weight

    def change(tensors):
        tensors["model.layers.2.shared_head.head.weight"] = head.detach() + 1
        tensors["model.layers.2.embed_tokens.weight"] = embeddings.detach().clone()

    layer = copied(change).heads.layer(0)
    torch.testing.assert_close(layer.lm_head.weight, head.detach() + 1)
    assert layer.embed_tokens is None


def test_decoders_that_cannot_run_one_layer_are_named(copied, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no cache here")

    monkeypatch.setattr(assembly, "MtpLayer", fail)
    words = r"Glm4MoeModel cannot be built and run with the single MTP layer.*no cache here"
    with pytest.raises(UnsupportedModelError, match=words):
        copied(lambda tensors: None)


def test_tensors_that_do_not_fit_the_base_are_refused_by_name(copied):
    def drop(tensors):
        del tensors[f"{ATTENTION}q_proj.weight"]

    def widen(tensors):
        tensors["model.layers.2.eh_proj.weight"] = torch.ones(48, 96)

    def widen_inner(tensors):
        tensors[f"{ATTENTION}o_proj.weight"] = torch.ones(40, 96)

    def shorten(tensors):
        tensors["model.layers.2.shared_head.head.weight"] = torch.ones(30, 40)

    def add(tensors):
        tensors[f"{ATTENTION}extra.weight"] = torch.ones(2)

    def empty(tensors):
        tensors["model.layers.2.embed_tokens.weight"] = torch.ones(0, 40)

    def drop_expert(tensors):
        del tensors[f"{EXPERTS}1.gate_proj.weight"]

    def narrow_expert(tensors):
        tensors[f"{EXPERTS}0.gate_proj.weight"] = torch.ones(3, 40)

    def spoil(tensors):
        tensors["model.layers.2.eh_proj.weight"][3, 5] = torch.nan

    def spoil_inner(tensors):
        tensors[f"{ATTENTION}q_proj.weight"][3, 5] = torch.inf

    for change, words in (
        (drop, r"MTP layer 0 lacks \['layers.0.self_attn.q_proj.weight'\]"),
        (widen, r"eh_proj.weight' has the shape \(48, 96\), expected \(40, 80\)"),
        (shorten, r"head.weight' has the shape \(30, 40\), expected \(160, 40\)"),
        (widen_inner, r"layers.2.self_attn.o_proj.weight' has the shape \(40, 96\)"),
        (add, r"MTP layer 0 has \['model.layers.2.self_attn.extra.weight'\]"),
        (empty, r"embed_tokens.weight' has the shape \(0, 40\), expected \(160, 40\)"),
        (drop_expert, r"tensor like '.*gate_proj.weight', and none for expert 1, expected one"),
        (narrow_expert, r"experts.0.gate_proj.weight' has the shape \(3, 40\), expected"),
        (spoil, "has numbers in 'projection.weight' that are not finite as torch.float32"),
        (spoil_inner, "self_attn.q_proj.weight' that are not finite"),
    ):
        with pytest.raises(CheckpointError, match=words):
            copied(change)
