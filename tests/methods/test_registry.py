"""A method that speclm does not know is added from here, and does all that a built-in one does."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import jaxtyping
import pytest
import torch
from torch import nn

from speclm import SpecModel
from speclm.cards import GENERATED_MARK, HeadsCard
from speclm.config import require_options
from speclm.drafting.interface import Draft, Proposer, TargetNeeds
from speclm.drafting.package import Package, write_package
from speclm.errors import CheckpointError, OptionError, UnknownNameError
from speclm.files.weights import read_text, weight_files
from speclm.methods import registry
from speclm.methods.ngram.proposer import NgramProposer
from speclm.methods.registry import (
    Method,
    Recipe,
    heads_names,
    method_of,
    register_method,
    register_proposer,
    registered_methods,
)
from speclm.model.report import describe_proposer
from speclm.target import TargetView
from speclm.training.acceptance_meter import AcceptanceMeter
from speclm.training.arguments import training_arguments
from speclm.training.dataset import load_examples
from speclm.training.heads_trainer import HeadsTrainer
from speclm.training.training_model import TrainingModel, rank_targets
from speclm.tree.topology import chain
from tests.model.hub import running_hub
from tests.models import generate, prompts, shared_model
from tests.training.alphabet import TAGGED, WORDS, tiny_base, word_tokenizer, write_alphabet
from tests.training.runs import SETTINGS


class ToyHeads(nn.Module):
    """Scores of the next token, by the last one."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(vocab_size, vocab_size))


class ToyProposer(Proposer):
    """Drafts the token that most often follows the root."""

    def __init__(self, heads, *, target, gain=1.0):
        self.heads, self.gain = heads, gain
        self.needs = TargetNeeds(vocab_size=TargetView(target).vocab_size)

    def begin(self, prompt):
        pass

    def propose(self, roots, *, noise):
        following = self.heads.table[roots].argmax(-1)
        return Draft(torch.stack([roots, following], 1), chain(1, device=roots.device), None)

    def commit(self, accepted):
        pass


# The trainer side.


class ToyTrainingModel(TrainingModel):
    def forward(self, input_ids, attention_mask, loss_mask):
        _, last = self.read_base(input_ids, attention_mask, (-1,))
        base_tokens = self.base_tokens(last, loss_mask)
        logits, targets = self.heads.table[input_ids[:, :-1]], input_ids[:, 1:]
        losses = nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
        ranks = torch.full((*input_ids.shape, 1), -1)
        # The token at t + 1 drafts the one after it, from the hidden state at t.
        wanted = base_tokens[:, 2:, None]
        ranks[:, :-2] = rank_targets(logits[:, 1:, None], wanted)
        mask = loss_mask[:, 1:]
        count = mask.sum()
        total = (losses * mask).sum()
        return {
            "loss": total / count,
            "loss_sums": total.detach()[None],
            "counts": count[None],
            "ranks": ranks,
            "base_tokens": base_tokens,
        }

    def new_meter(self):
        return AcceptanceMeter(((0,),), num_drafted=1, name="toy")

    def write(self, folder):
        write_toy(folder, self.heads, card=None)


@dataclass(frozen=True, slots=True)
class ToyOptions:
    scale: Annotated[float, "Size of new tables."] = 0.1


class ToyRecipe(Recipe):
    name, summary, options = "toy", "Train a table.", ToyOptions

    def trainer(self, base, args, *, options, train_dataset, eval_dataset=None):
        heads = ToyHeads(TargetView(base).vocab_size)
        nn.init.normal_(heads.table, std=options.scale)
        return HeadsTrainer(
            ToyTrainingModel(base, heads),
            args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
        )


def write_toy(folder, heads, *, card):
    tensors = {"toy.table": heads.table.detach()}

    package = Package({"toy_size": len(heads.table)}, {"toy.safetensors": tensors})
    write_package(folder, package, card=card, check=lambda aside: None)


class ToyMethod(Method):
    name = "toy"
    summary = "a table of what follows each token"
    aliases = ("toys",)
    recipes = (ToyRecipe(),)

    def find_weights(self, folder):
        return next((files for files in weight_files(folder) if "toy.table" in files.files), None)

    def is_likely(self, folder):
        return "toy_size" in read_text(folder / "config.json")

    def load(self, source, target):
        require_options(source.options, ("gain",), owner="toy heads")
        table = self.find_weights(source.folder).load(["toy.table"])["toy.table"]
        heads = ToyHeads(len(table))
        heads.load_state_dict({"table": table})
        return ToyProposer(heads, target=target, **source.options)

    def owns(self, proposer):
        return isinstance(proposer, ToyProposer)

    def describe(self, proposer):
        return f"toy table of {len(proposer.heads.table)} tokens"

    def require_writable(self, folder):
        if (folder / "taken").exists():
            raise CheckpointError(f"{folder} is taken")

    def save(self, proposer, destination):
        card = HeadsCard(
            kind="toy",
            title="Toy heads",
            summary="A table.",
            facts={"rows": len(proposer.heads.table)},
            software="None.",
            num_parameters=proposer.heads.table.numel(),
            dtype="float32",
            base=destination.base_id,
            repo_id=destination.repo_id,
        )
        write_toy(destination.folder, proposer.heads, card=destination.card(card.render()))


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setattr(registry, "_ADDED", {})
    method = ToyMethod()
    register_method(method)
    return method


def write_random(folder, base):
    heads = ToyHeads(base.config.vocab_size)
    nn.init.normal_(heads.table, generator=torch.Generator().manual_seed(0))
    write_toy(folder, heads, card=None)
    return folder


def require_tokens_of_the_base(spec, base):
    for sampled in (True, False):
        settings = {"do_sample": sampled, "max_new_tokens": 8}
        expected, state = generate(base, prompts(6, 9), **settings)
        found, state_found = generate(spec, prompts(6, 9), **settings)
        assert torch.equal(found, expected)
        assert torch.equal(state_found, state)
    assert spec.last_speculation.fallbacks == []


def test_added_method_is_loaded_generates_reports_and_is_saved(toy, tmp_path):
    base = shared_model("llama")
    folder = write_random(tmp_path / "first", base)
    spec = SpecModel.from_pretrained(base, folder, heads_kwargs={"gain": 2.0})
    assert isinstance(spec.proposer, ToyProposer)
    assert spec.proposer.gain == 2.0
    require_tokens_of_the_base(spec, base)
    lines: list[str] = []
    spec.print_report(write=lines.append)
    assert any("toy table of 160 tokens" in line for line in lines)
    spec.save_pretrained(tmp_path / "second")
    card = (tmp_path / "second" / "README.md").read_text()
    assert GENERATED_MARK in card
    assert "| rows | 160 |" in card
    again = SpecModel.from_pretrained(base, tmp_path / "second")
    assert torch.equal(again.proposer.heads.table, spec.proposer.heads.table)
    require_tokens_of_the_base(again, base)
    with pytest.raises(OptionError, match=r"toy heads: unknown option 'gian'.*did you mean 'gain'"):
        SpecModel.from_pretrained(base, folder, heads_kwargs={"gian": 1})


def test_added_method_is_pushed_and_loaded_from_the_hub(toy, tmp_path, monkeypatch):
    base = shared_model("llama")
    spec = SpecModel.from_pretrained(base, write_random(tmp_path / "me" / "toy", base))
    with running_hub(tmp_path, monkeypatch) as hub:
        spec.push_to_hub("me/pushed")
        loaded = SpecModel.from_pretrained(base, "me/toy")
    assert hub.commits["me/pushed"].keys() == {"README.md", "config.json", "toy.safetensors"}
    assert json.loads(hub.commits["me/pushed"]["config.json"]) == {"toy_size": 160}
    assert torch.equal(loaded.proposer.heads.table, spec.proposer.heads.table)
    with pytest.raises(UnknownNameError, match="'toys' is a kind of heads"):
        SpecModel.from_pretrained(base, "toys")


def test_added_method_is_trained_through_its_recipe(toy, tmp_path):
    (recipe,) = toy.recipes
    base = tiny_base()
    rows = load_examples(write_alphabet(tmp_path / "rows.jsonl"), word_tokenizer(TAGGED))
    settings = {**SETTINGS, "max_steps": 2, "learning_rate": 0.1}
    args = training_arguments(tmp_path / "out", settings)
    trainer = recipe.trainer(base, args, options=recipe.options(scale=0.2), train_dataset=rows)
    trainer.train()
    trainer.save_model()
    assert trainer.state.log_history[-1]["step"] == 2
    loaded = SpecModel.from_pretrained(base, tmp_path / "out")
    assert torch.equal(loaded.proposer.heads.table, trainer.heads.table)
    assert len(loaded.proposer.heads.table) == len(WORDS)


def test_registered_methods_are_named_and_described(toy):
    assert [*registered_methods()] == [
        *("lookup", "ngram", "recycling", "mtp"),
        *("medusa", "block", "eagle", "gemma_assistant", "draft_model", "toy"),
    ]
    for name, method in registered_methods().items():
        assert method.name == name
        assert len(method.summary) > 20
        assert "\n" not in method.summary
    assert {
        recipe.name for method in registered_methods().values() for recipe in method.recipes
    } == {*("mtp", "medusa", "medusa2", "block", "eagle", "eagle3", "draft", "toy")}
    registered_methods().clear()
    assert "toy" in registered_methods()


def test_registered_class_is_available_by_name_and_may_be_replaced(toy):
    @register_proposer("mine")
    class Mine(NgramProposer):
        """Copies as I like it."""

    assert heads_names() == ["lookup", "mine", "mtp", "ngram", "recycling"]
    assert registered_methods()["mine"].summary == "Copies as I like it."
    base = shared_model("llama")
    spec = SpecModel.from_pretrained(base, "mine", heads_kwargs={"max_ngram": 3})
    assert type(spec.proposer) is Mine
    assert method_of(spec.proposer).name == "mine"
    assert method_of(NgramProposer()).name == "ngram"

    @register_proposer("mine")
    class Other(Proposer):
        def __init__(self, size):
            raise AssertionError

        def begin(self, prompt): ...
        def propose(self, roots, *, noise): ...
        def commit(self, accepted): ...

    with pytest.raises(OptionError, match=r"'mine' cannot be built with \[\].*see help\(Other\)"):
        SpecModel.from_pretrained(base, "mine")


@pytest.mark.parametrize("wrong", [ToyMethod, None, type("Nameless", (ToyMethod,), {"name": 3})()])
def test_only_methods_with_a_name_are_registered(toy, wrong, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as users run it
    with pytest.raises(OptionError, match=r"method is .*, expected a Method with a name"):
        register_method(wrong)
    assert [*registry._ADDED] == ["toy"]


@pytest.mark.parametrize("wrong", [dict, NgramProposer(), len])
def test_only_proposer_classes_are_registered_by_name(toy, wrong, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as users run it
    with pytest.raises(OptionError, match=r"'mine' is .*, expected a subclass of Proposer"):
        register_proposer("mine")(wrong)
    with pytest.raises(OptionError, match=r"proposer name is .*, expected a string"):
        register_proposer(NgramProposer)  # without the name


def test_method_whose_heads_are_files_is_not_replaced_by_a_proposer(toy):
    with pytest.raises(OptionError, match=r"'medusa' is a method that loads files.*another name"):
        register_proposer("medusa")(NgramProposer)
    assert "medusa" not in registry._ADDED


def test_proposers_of_no_method_are_described_and_not_saved(toy, tmp_path):
    base = shared_model("llama")
    proposer = ToyProposer(ToyHeads(160), target=base)
    assert method_of(proposer) is toy
    registry._ADDED.clear()
    assert method_of(proposer) is None
    assert describe_proposer(proposer).startswith("ToyProposer, ")
    with pytest.raises(OptionError, match="ToyProposer, which has no heads to save"):
        SpecModel(base, proposer).save_pretrained(tmp_path)


def test_methods_and_their_training_options_are_listed_without_pytorch():
    script = (
        "import sys, types\n"
        "package = types.ModuleType('speclm')\n"
        "package.__path__ = ['speclm']\n"  # whatever the package itself imports
        "sys.modules['speclm'] = package\n"
        "from speclm.methods.registry import registered_methods\n"
        "found = [r.options() for m in registered_methods().values() for r in m.recipes]\n"
        "assert len(found) == 7\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    root = Path(__file__).parents[2]
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=root, check=False, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
