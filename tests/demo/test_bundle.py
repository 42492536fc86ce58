import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from speclm import SpecModel
from speclm.demo import bundle
from speclm.demo.bundle import assets, load_prompts, load_questions
from speclm.errors import MissingAssetError, OptionError
from speclm.files.questions import MT_BENCH_CATEGORIES

MAX_BYTES = 35_000_000
MIN_AGREEMENT = 0.5  # far above 1/4096 of random tokens, below what was measured
ROWS = {"sql_dev": 100, "gsm8k_dev": 100, "sql_tune": 50, "gsm8k_tune": 50}
ROWS |= {"sql_train": 300, "sql_case": 450}


@pytest.fixture(scope="module")
def models() -> dict[str, LlamaForCausalLM]:
    return {
        name: AutoModelForCausalLM.from_pretrained(assets()[name], dtype=torch.float32)
        for name in ("base", "draft")
    }


def test_assets_lie_inside_the_package():
    package = Path(bundle.__file__).parent
    assert set(assets()) == set(bundle.NAMES)
    assert all(path.is_dir() and path.is_relative_to(package) for path in assets().values())


def test_assets_stay_small():
    sizes = [path.stat().st_size for path in bundle.DATA.rglob("*") if path.is_file()]
    assert sum(sizes) < MAX_BYTES


def test_missing_asset_is_named_with_its_folder_and_the_remedy(tmp_path, monkeypatch):
    (tmp_path / "base").mkdir()
    monkeypatch.setattr(bundle, "DATA", tmp_path)
    with pytest.raises(
        MissingAssetError,
        match=r"found no \['block', 'draft', 'eagle', .*'prompts', 'questions'\].*install",
    ) as error:
        assets()
    assert str(tmp_path) in str(error.value)


def test_data_come_with_origin_and_licences():
    readme = (bundle.DATA / "README.md").read_text(encoding="utf-8")
    for licence in (
        "prompts/LICENSE-wikisql.txt",
        "prompts/LICENSE-gsm8k.txt",
        "questions/LICENSE-spec-bench.txt",
    ):
        assert "Copyright" in (bundle.DATA / licence).read_text(encoding="utf-8")
        assert licence in readme


def test_questions_are_a_few_of_every_category_of_spec_bench():
    questions = load_questions("spec-bench")
    found = Counter(question.group for question in questions)
    others = ("translation", "summarization", "qa", "math_reasoning", "rag")
    assert found == {"mt_bench": 16, **dict.fromkeys(others, 5)}
    of_mt_bench = load_questions("mt-bench")
    assert Counter(question.group for question in of_mt_bench) == dict.fromkeys(
        MT_BENCH_CATEGORIES, 2
    )
    assert all(len(question.turns) == 2 for question in of_mt_bench)
    folder = assets()["questions"]
    assert sum(path.stat().st_size for path in folder.iterdir()) < 100_000
    with pytest.raises(OptionError, match=r"named one of \['spec-bench', 'mt-bench'\]"):
        load_questions("humaneval")


def test_models_are_stored_in_bfloat16_and_load_in_float32(models):
    for name, model in models.items():
        assert json.loads((assets()[name] / "config.json").read_text())["dtype"] == "bfloat16"
        assert {weight.dtype for weight in model.parameters()} == {torch.float32}


def test_draft_has_the_vocabulary_and_special_tokens_of_the_base(models):
    base, draft = models["base"].config, models["draft"].config
    for field in ("vocab_size", "eos_token_id", "pad_token_id", "max_position_embeddings"):
        assert getattr(draft, field) == getattr(base, field)
    tokenizers = [AutoTokenizer.from_pretrained(assets()[name]) for name in ("base", "draft")]
    assert tokenizers[0].get_vocab() == tokenizers[1].get_vocab()
    assert tokenizers[0].chat_template == tokenizers[1].chat_template


def test_draft_stops_where_the_base_stops(models):
    base, draft = models["base"].generation_config, models["draft"].generation_config
    assert draft.eos_token_id == base.eos_token_id
    assert draft.pad_token_id == base.pad_token_id


def test_draft_is_about_a_tenth_of_the_base(models):
    ratio = models["draft"].num_parameters() / models["base"].num_parameters()
    assert 0.08 < ratio < 0.12


@pytest.mark.parametrize(
    ("name", "least_tau"), [("medusa", 1.2), ("eagle", 1.5), ("eagle3", 2.5), ("block", 1.2)]
)
def test_heads_fit_the_base_and_draft_what_it_answers(models, name, least_tau):
    spec = SpecModel.from_pretrained(models["base"], assets()[name])
    tokenizer = AutoTokenizer.from_pretrained(assets()["base"])
    for messages in load_prompts("sql_tune", limit=1):
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        expected = models["base"].generate(**inputs, max_new_tokens=32)
        assert torch.equal(spec.generate(**inputs, max_new_tokens=32), expected)
        assert spec.last_speculation.tau > least_tau


@pytest.mark.parametrize("name", ["sql_tune", "gsm8k_tune"])
def test_draft_agrees_with_the_base_on_what_the_base_answers(models, name):
    tokenizer = AutoTokenizer.from_pretrained(assets()["base"])
    agreeing = total = 0
    for messages in load_prompts(name, limit=2):
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        output = models["base"].generate(**inputs, max_new_tokens=32, do_sample=False)
        prompt_length = inputs["input_ids"].shape[1]
        with torch.no_grad():
            drafted = models["draft"](output).logits[0, prompt_length - 1 : -1].argmax(-1)
        agreeing += int((drafted == output[0, prompt_length:]).sum())
        total += len(drafted)
    assert agreeing / total > MIN_AGREEMENT


@pytest.mark.parametrize("name", ROWS)
def test_conversations_are_well_formed_and_end_with_the_user(name):
    prompts = load_prompts(name)
    roles = ["system", "user"] if name.startswith("sql") else ["user"]
    assert len(prompts) == ROWS[name]
    for messages in prompts:
        assert [message["role"] for message in messages] == roles
        assert all(message.keys() == {"role", "content"} for message in messages)
        assert all(message["content"].strip() for message in messages)


@pytest.mark.parametrize("task", ["sql", "gsm8k"])
def test_tuning_prompts_are_not_reported_on(task):
    dev, tune = load_prompts(f"{task}_dev"), load_prompts(f"{task}_tune")
    assert not any(messages in dev for messages in tune)


def test_prompts_of_the_case_are_neither_trained_nor_tuned_on():
    case = load_prompts("sql_case")
    assert case[:100] == load_prompts("sql_dev")
    used = load_prompts("sql_train") + load_prompts("sql_tune")
    assert not any(messages in used for messages in case)


def test_limit_keeps_the_first_conversations():
    assert load_prompts("sql_dev", limit=3) == load_prompts("sql_dev")[:3]
    assert load_prompts("sql_dev", limit=0) == []


def test_negative_limit_is_refused():
    with pytest.raises(OptionError, match=r"limit to be at least 0.*-1"):
        load_prompts("sql_dev", limit=-1)


def test_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(OptionError, match=r"gsm8k_dev.*sql_tune.*'sql_test'"):
        load_prompts("sql_test")
