"""lm-eval scores a `SpecModel`, or a patched base, as it scores the base, in fewer forwards."""

import contextlib
import json

import pytest
import torch
from lm_eval import evaluate
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from speclm import SpecModel
from speclm.demo.bundle import assets
from tests.outcomes import reading

QUESTIONS = [
    "SELECT name FROM table_1 WHERE name = ",
    "how many wins in table_2",
    "SELECT wins FROM table_2 WHERE wins = ",
]
GENERATE = {
    "output_type": "generate_until",
    "generation_kwargs": {"until": [";", "\n\n"], "max_gen_toks": 24},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}
SAMPLE = {
    **GENERATE,
    "generation_kwargs": {
        "until": [";"],
        "max_gen_toks": 16,
        "do_sample": True,
        "temperature": 0.8,
    },
    "repeats": 2,
}
CHOOSE = {
    "output_type": "multiple_choice",
    "doc_to_choice": [" 1", " WHERE", " name"],
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}
SCORE = {"output_type": "loglikelihood_rolling", "metric_list": [{"metric": "bits_per_byte"}]}


@pytest.fixture(scope="module")
def base():
    return AutoModelForCausalLM.from_pretrained(assets()["base"], dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(assets()["base"])


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    """The folder of a data set in one file, and of what lm-eval keeps of it."""
    folder = tmp_path_factory.mktemp("documents")
    lines = [json.dumps({"question": question, "answer": 1}) for question in QUESTIONS]
    (folder / "test.jsonl").write_text("\n".join(lines))
    return folder


def scores(model, tokenizer, documents, settings):
    """Return what lm-eval found, with what was said to each document, and decoder forwards."""
    task = ConfigurableTask(
        config={
            "task": "local",
            "dataset_path": "json",
            "dataset_kwargs": {
                "data_files": {"test": str(documents / "test.jsonl")},
                "cache_dir": str(documents / "cache"),
            },
            "test_split": "test",
            "doc_to_text": "{{question}}",
            "doc_to_target": "{{answer}}",
            **settings,
        }
    )
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2, device="cpu")
    forwards = []
    handle = model.get_decoder().register_forward_hook(reading(lambda *_: forwards.append(1)))
    torch.manual_seed(3)
    found = evaluate(lm, {"local": task}, bootstrap_iters=0)
    handle.remove()
    said = [(s["doc_id"], s["resps"], s["filtered_resps"]) for s in found["samples"]["local"]]
    return found["results"], said, len(forwards)


@pytest.mark.parametrize("place", ["model", "patch"])
@pytest.mark.parametrize("settings", [GENERATE, SAMPLE], ids=["greedy", "sampled"])
def test_generated_answers_are_the_bases_in_fewer_forwards(
    base, tokenizer, documents, place, settings
):
    results, said, forwards = scores(base, tokenizer, documents, settings)
    assert any(text for _, answers, _ in said for texts in answers for text in texts)
    spec = SpecModel.from_pretrained(base, assets()["medusa"])
    with spec if place == "patch" else contextlib.nullcontext():
        model = base if place == "patch" else spec
        found = scores(model, tokenizer, documents, settings)
    assert found[:2] == (results, said)
    assert spec.last_speculation.fallbacks == []
    assert found[2] < forwards


@pytest.mark.parametrize("settings", [CHOOSE, SCORE], ids=["choices", "texts"])
def test_loglikelihoods_are_those_of_the_base(base, tokenizer, documents, settings):
    expected = scores(base, tokenizer, documents, settings)
    spec = SpecModel.from_pretrained(base, assets()["medusa"])
    assert scores(spec, tokenizer, documents, settings) == expected
    with spec:
        assert scores(base, tokenizer, documents, settings) == expected
