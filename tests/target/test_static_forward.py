"""Verification over fixed shapes computes what a usual forward does."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)

from speclm.engines import Engine, GraphEngine
from speclm.errors import EngineError
from speclm.kernels.backends import VARIABLE
from speclm.target import StaticForward, TargetFeatures, TargetView
from speclm.target.static_forward import BUCKETS
from speclm.tree.topology import TreeTopology, chain, from_parents
from tests.exactness import tiny
from tests.grids import grid, turns
from tests.models import prompts, shared_model
from tests.stand_ins import Failing, FullGraph, Unreading, record, replaying, unread

TOLERANCE = 1e-4  # of logits, in float32
LAYERS = {"none": (), "one and the last": (1, -1)}
LENGTHS = {"one row": (9,), "padded rows": (11, 4, 7)}
TREES = {
    "chain": [[0, 0, 1, 2]],
    "tree": [[0, 0, 0, 1, 1, 2, 3, 3, 4]],
    "root": [[0]],
}


def build(family: str) -> PreTrainedModel:
    if family == "gemma3":
        kinds = ["sliding_attention", "full_attention"]
        shape = {"layer_types": kinds, "sliding_window": 6}
        return tiny(Gemma3ForCausalLM, Gemma3TextConfig, **shape)
    if family == "mixtral":
        shape = {"num_local_experts": 4, "num_experts_per_tok": 2}
        return tiny(MixtralForCausalLM, MixtralConfig, **shape)
    return shared_model(family)


class Verifying:
    """Verifies the same drafts with and without an engine."""

    def __init__(self, model: PreTrainedModel, engine: Engine, lengths: tuple[int, ...]) -> None:
        self.view, inputs = TargetView(model), prompts(*lengths, vocab_size=60)
        self.static = StaticForward(self.view, engine)
        mask = inputs["attention_mask"]
        padding = (mask == 0).sum(1)
        self.batch = len(mask)
        self.usual = self.view.new_cache(padding)
        self.fixed = self.view.new_cache(padding, allocate=self.static.allocate)
        with torch.no_grad():
            for cache in (self.usual, self.fixed):
                self.view.prefill(inputs["input_ids"], cache, attention_mask=mask)

    @torch.no_grad()
    def compare(self, parents: list[list[int]], *, paths: list[list[int]], layers=()) -> bool:
        """Return whether the engine verified a tree; keep a path of each row."""
        topology = from_parents(parents, device=torch.device("cpu"))
        seed = torch.Generator().manual_seed(self.usual.tree_start)
        tokens = torch.randint(60, (self.batch, topology.num_nodes), generator=seed)
        with self.view.decoding(TargetFeatures(layers)):
            expected = self.view.forward_tree(tokens, topology, self.usual, max_length=99)
            features = self.view.features
            found = self.static.verify(tokens, topology, self.fixed, max_length=99)
            assert (features is None) == (layers == ())
            if found is not None:
                torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=TOLERANCE)
            if found is not None and features is not None:
                close = {"atol": TOLERANCE, "rtol": TOLERANCE}
                torch.testing.assert_close(self.view.features, features, **close)
        if found is None:
            self.view.forward_tree(tokens, topology, self.fixed, max_length=99)
        for cache in (self.usual, self.fixed):
            cache.keep(paths)
        return found is not None


@pytest.mark.parametrize(
    ("family", "layers", "lengths"),
    turns(["llama", "qwen3", "mistral", "gemma3", "mixtral"], LAYERS, LENGTHS),
)
def test_trees_of_changing_shapes_and_lengths_have_the_usual_logits_and_features(
    family, layers, lengths
):
    verifying = Verifying(build(family), replaying(), LENGTHS[lengths])
    for shape, kept in (("tree", 2), ("chain", 3), ("root", 1), ("chain", 2), ("tree", 1)):
        paths = [[0, 1, 3][: max(kept - row, 1)] for row in range(verifying.batch)]
        assert verifying.compare(TREES[shape], paths=paths, layers=LAYERS[layers])
        assert verifying.fixed.host_lengths == verifying.usual.host_lengths
    assert verifying.static.describe() == "graph"


@pytest.mark.parametrize(
    ("family", "lengths"), [("llama", "padded rows"), ("gemma3", "one row"), ("qwen3", "one row")]
)
def test_graphs_contain_the_tree_attention_kernel_where_it_pays(family, lengths, monkeypatch):
    monkeypatch.setenv(VARIABLE, "reference")
    asked = []

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            asked.append(func._schema.name)
            return func(*args, **(kwargs or {}))

    def capture(compute, device):
        with Counting():
            return record(compute, device)

    verifying = Verifying(build(family), GraphEngine(capture), LENGTHS[lengths])
    for shape, kept in (("tree", 2), ("chain", 3), ("chain", 2), ("tree", 1)):
        paths = [[0, 1, 3][: max(kept - row, 1)] for row in range(verifying.batch)]
        assert verifying.compare(TREES[shape], paths=paths)
    num_layers = verifying.view.num_layers
    num_sizes = len(verifying.static.engine._prepared)
    assert asked.count("speclm::tree_attention") == num_layers * num_sizes
    assert verifying.static.obstacle is None


def test_rows_of_different_trees_are_padded_to_one_bucket():
    verifying = Verifying(shared_model("llama"), replaying(), (5, 8))
    assert verifying.compare([[0, 0, 0], [0, 0, 1, 2]], paths=[[0, 2], [0, 1, 2, 3]])
    assert verifying.compare([[0], [0, 0]], paths=[[0], [0, 1]])


@pytest.mark.parametrize(
    ("family", "layers"),
    grid(
        [("gemma3", ""), ("mixtral", "none"), ("llama", ""), ("qwen3", "none")],
        runs=lambda family, layers: family in {"gemma3", "mixtral"},  # windows, and experts
    ),
)
def test_a_forward_is_one_graph_without_breaks(family, layers):
    engine, chosen = FullGraph(), LAYERS.get(layers, LAYERS["one and the last"])
    verifying = Verifying(build(family), engine, (7,))
    for _ in range(3):
        assert verifying.compare(TREES["chain"], paths=[[0, 1]], layers=chosen)
    assert verifying.static.obstacle is None
    assert len(engine._prepared) == 1


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_a_stage_reads_nothing_on_the_host(family):
    verifying = Verifying(build(family), Unreading(), (7, 4))
    for _ in range(2):
        assert verifying.compare(TREES["tree"], paths=[[0, 1], [0]], layers=(1, -1))
    assert verifying.static.obstacle is None
    with pytest.raises(AssertionError, match="host reads"), unread():
        bool(torch.ones(1))


@torch.no_grad()
def test_what_has_no_fixed_shape_is_left_to_the_usual_forward():
    verifying = Verifying(shared_model("llama"), replaying(), (5,))
    static, cache = verifying.static, verifying.fixed
    large = BUCKETS[-1] + 1
    wide = from_parents([[0] * large], device=torch.device("cpu"))
    tokens = torch.zeros(1, large, dtype=torch.long)
    assert static.verify(tokens, wide, cache, max_length=None) is None
    root = tokens[:, :1]
    cache.position_shift = torch.tensor([1])
    assert static.verify(root, chain(0), cache, max_length=None) is None
    cache.position_shift = None
    empty = verifying.view.new_cache(torch.tensor([0]), allocate=static.allocate)
    assert static.verify(root, chain(0), empty, max_length=None) is None
    assert static.verify(root, chain(0), cache, max_length=None) is not None
    assert static.obstacle is None


def test_an_engine_that_fails_is_given_up_with_one_reason(caplog):
    verifying = Verifying(shared_model("llama"), Failing(), (5,))
    assert verifying.compare(TREES["chain"], paths=[[0, 1]])  # by the usual forward, as a proof
    for _ in range(2):
        assert not verifying.compare(TREES["chain"], paths=[[0, 1]])
    assert "OutOfMemoryError" in verifying.static.describe()
    assert verifying.static.describe().startswith("eager, because failing cannot run")
    assert len(caplog.records) == 1


def test_a_model_that_computes_otherwise_over_fixed_shapes_is_found_at_once(monkeypatch):
    verifying = Verifying(shared_model("llama"), replaying(), (5,))
    monkeypatch.setattr("speclm.target.static_forward.seen_slots", _all_seen)
    assert verifying.compare(TREES["tree"], paths=[[0, 1]])
    assert "something else" in verifying.static.obstacle
    assert not verifying.compare(TREES["tree"], paths=[[0, 1]])
    length = verifying.usual.host_lengths[0]
    for usual, fixed in zip(verifying.usual.layers, verifying.fixed.layers, strict=True):
        assert torch.equal(usual.keys[:, :, :length], fixed.keys[:, :, :length])


def _all_seen(depths, ancestors, lengths, num_padding, *, capacity, window):
    return torch.ones(*depths.shape, capacity, dtype=torch.bool)[:, None]


def test_layers_of_windows_without_names_have_no_masks():
    verifying = Verifying(build("gemma3"), replaying(), (5,))
    verifying.view.model.config.layer_types = ["sliding_attention"] * 2
    assert verifying.compare(TREES["tree"], paths=[[0, 1]])
    assert "masks of windows" in verifying.static.obstacle


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda model: setattr(model.config, "_attn_implementation_internal", "flex"), "'flex'"),
        (lambda model: setattr(model.model.layers[0], "_hf_hook", object()), "moved between"),
        (lambda model: model.lm_head.to("meta"), "2 devices"),
    ],
)
def test_models_without_fixed_shapes_are_named(change, reason):
    model = build("gemma3")
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    change(model)
    assert reason in StaticForward(TargetView(model), replaying()).obstacle


def test_errors_of_an_engine_say_what_to_do():
    with pytest.raises(EngineError, match="engine='eager'"):
        Failing().run(lambda: (), [], [])


def test_a_padded_topology_is_made_once():
    topology: TreeTopology = chain(2)
    depths, ancestors = topology.padded(8)
    assert depths.tolist() == [[0, 1, 2, 0, 0, 0, 0, 0]]
    assert ancestors[0].diagonal().all()
    assert topology.padded(8)[0] is depths
