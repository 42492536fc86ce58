import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from speclm import SpecModel
from speclm.cache import CACHE_NAME
from speclm.demo.bundle import assets, load_prompts
from speclm.errors import DataError, OptionError, VocabularyMismatchError
from speclm.methods.block.checkpoint import read_block
from speclm.methods.block.method import BlockRecipe
from speclm.methods.block.objective import BlockObjective, BlockTrainingModel
from speclm.methods.block.proposer import BlockProposer
from speclm.methods.block.training import load_block_heads, new_block_heads
from speclm.methods.medusa.training import MedusaTrainingModel, new_medusa_heads
from speclm.training.arguments import training_arguments
from speclm.training.conversations import Example
from speclm.training.dataset import ExampleDataset, load_examples
from speclm.training.heads_trainer import HeadsTrainer
from tests.families.building import build_family
from tests.models import build_model, prompts
from tests.training.alphabet import TAGGED, WORDS, word_tokenizer, write_alphabet
from tests.training.runs import SETTINGS

QUICK = {"learning_rate": 0.01, "lr_scheduler_type": "constant", "warmup_steps": 0}
NEAR = 0.01  # of tau; the rounds are the same, near ties aside
COLUMNS = torch.arange(4, 24)


def small_base(**settings):
    return build_model("llama", num_hidden_layers=4, vocab_size=len(WORDS), **settings)


@pytest.fixture
def rows(tmp_path):
    return load_examples(write_alphabet(tmp_path / "rows.jsonl"), word_tokenizer(TAGGED))


@pytest.fixture
def make(tmp_path, rows):
    def make_trainer(
        kind="dspark", *, base=None, heads=None, folder="out", train_dataset=None, **settings
    ):
        base = base or small_base()
        heads = heads or new_block_heads(base, kind=kind, block_size=4, num_layers=1)
        objective = BlockObjective.usual(kind, num_drafts=heads.config.num_drafts)
        eval_dataset = settings.pop("eval_dataset", None)
        return HeadsTrainer(
            BlockTrainingModel(base, heads, objective=objective),
            training_arguments(
                tmp_path / folder, {**SETTINGS, **settings}, defaults=BlockRecipe.defaults
            ),
            train_dataset=train_dataset or rows,
            eval_dataset=eval_dataset,
        )

    return make_trainer


@pytest.mark.parametrize("kind", ["dspark", "dflash", "jetspec"])
def test_loss_falls_and_logs_have_the_figures_of_each_position(make, rows, kind):
    trainer = make(kind, max_steps=15, eval_dataset=rows, **QUICK)
    trainer.train()
    first, last = trainer.state.log_history[0], trainer.state.log_history[-2]
    assert last["loss"] < 0.9 * first["loss"]
    figures = {f"position{k}_top{top}" for k in (0, 1, 2) for top in (1, 2, 3)}
    assert {*figures, "position2_loss", "estimated_tau"} <= set(last)
    assert ("position3_top1" in last) == (kind == "dspark")
    assert "estimated_tree_tau" not in last
    metrics = trainer.evaluate()
    assert metrics["eval_estimated_tree_tau"] >= metrics["eval_estimated_tau"] - NEAR


def test_heads_that_learned_draft_what_the_base_says(tmp_path, make):
    base = small_base()
    inputs = prompts(3, vocab_size=len(WORDS))
    said = base.generate(**inputs, max_new_tokens=24, do_sample=False)
    row = Example(input_ids=said[0].tolist(), loss_mask=[0] * 3 + [1] * 24)
    data = ExampleDataset([row] * 4)
    trainer = make(base=base, train_dataset=data, max_steps=40, **QUICK)
    trainer.train()
    trainer.save_model()
    spec = SpecModel.from_pretrained(base, tmp_path / "out")
    assert torch.equal(spec.generate(**inputs, max_new_tokens=24, do_sample=False), said)
    assert spec.last_speculation.tau > 1.5


def test_saved_heads_go_on_from_where_they_were(tmp_path, make):
    base = small_base()
    first = make(
        base=base,
        heads=new_block_heads(base, kind="dspark", block_size=3, columns=COLUMNS),
        max_steps=2,
    )
    first.train()
    first.save_model()
    saved, trained = read_block(tmp_path / "out"), first.heads.state_dict()
    assert all(torch.equal(saved.tensors[name], value) for name, value in trained.items())
    heads = load_block_heads(base, tmp_path / "out")
    assert heads.config == first.heads.config
    assert torch.equal(heads.draft_columns, COLUMNS)
    assert heads.dtype == torch.float32
    before = heads.fc.weight.clone()
    make(base=base, heads=heads, folder="second", max_steps=2).train()
    assert not torch.equal(heads.fc.weight, before)


def test_loaded_heads_have_no_copies_of_the_base(tmp_path):
    base = small_base()
    heads = new_block_heads(base, kind="dflash", has_own_embeddings=True, has_own_lm_head=True)
    heads.init_weights_(
        lm_weight=base.get_output_embeddings().weight,
        embeddings=base.get_input_embeddings().weight,
    )
    objective = BlockObjective.usual("dflash", num_drafts=7)
    BlockTrainingModel(base, heads, objective=objective).write(tmp_path / "out")
    loaded = load_block_heads(base, tmp_path / "out")
    assert (loaded.embed_tokens, loaded.lm_head) == (None, None)


def test_output_matrix_of_a_draft_vocabulary_is_that_of_the_base():
    base = small_base()
    heads = new_block_heads(base, kind="jetspec", columns=COLUMNS)
    assert torch.equal(heads.lm_head.weight, base.get_output_embeddings().weight[COLUMNS])
    assert {parameter.dtype for parameter in heads.parameters()} == {torch.float32}
    assert new_block_heads(base, kind="jetspec").lm_head is None
    same = [new_block_heads(base, kind="dspark", seed=seed).fc.weight for seed in (1, 1, 2)]
    assert torch.equal(same[0], same[1])
    assert not torch.equal(same[0], same[2])


def test_heads_of_another_method_cannot_be_loaded_to_go_on(tmp_path):
    base = small_base()
    MedusaTrainingModel(base, new_medusa_heads(base)).write(tmp_path / "medusa")
    with pytest.raises(OptionError, match=r"those of the method 'medusa', expected block heads"):
        load_block_heads(base, tmp_path / "medusa")


def test_heads_of_another_base_are_refused(make):
    heads = new_block_heads(build_model("llama", num_hidden_layers=4), kind="dspark")
    with pytest.raises(VocabularyMismatchError, match="block heads have a vocabulary of 160"):
        make(heads=heads)
    narrow = small_base(hidden_size=8, num_attention_heads=2, head_dim=4)
    with pytest.raises(OptionError, match="block heads read features of width 8"):
        make(heads=new_block_heads(narrow, kind="dspark"))
    deep = build_model("llama", num_hidden_layers=9, vocab_size=len(WORDS))
    with pytest.raises(OptionError, match=r"feature_layers is .*, expected at most 4"):
        make(heads=new_block_heads(deep, kind="dspark"))


def test_rows_longer_than_the_heads_were_built_for_are_refused(make):
    base = small_base()
    heads = new_block_heads(base, kind="dspark", max_position_embeddings=9)
    with pytest.raises(DataError, match="expected at most 9, the positions that base and heads"):
        make(base=base, heads=heads)


def answered(base, tokenizer, *, num_rows, max_new_tokens):
    """Return prompts of the demo, and what the base answers to each."""
    inputs = tokenizer.apply_chat_template(
        load_prompts("sql_tune", limit=num_rows),
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
        padding=True,
    )
    length = inputs["input_ids"].shape[1]
    said = base.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    rows = []
    for row, mask in zip(said, inputs["attention_mask"], strict=True):
        prompt, answer = row[:length][mask.bool()].tolist(), row[length:].tolist()
        if base.config.eos_token_id in answer:
            answer = answer[: answer.index(base.config.eos_token_id) + 1]
        written = [0] * len(prompt) + [1] * len(answer)
        rows.append(Example(input_ids=prompt + answer, loss_mask=written))
    return inputs, rows


def test_estimated_tau_of_chain_and_tree_are_those_of_decoding(tmp_path):
    base = AutoModelForCausalLM.from_pretrained(assets()["base"], dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(assets()["base"], padding_side="left")
    limit = {"max_new_tokens": 16, "do_sample": False}
    inputs, rows = answered(base, tokenizer, num_rows=2, max_new_tokens=16)
    heads = new_block_heads(base, kind="dspark", block_size=4, num_layers=1, markov_rank=16)
    objective = BlockObjective.usual("dspark", num_drafts=4)
    settings = {"max_steps": 15, "learning_rate": 4e-3, "warmup_steps": 2}
    trainer = HeadsTrainer(
        BlockTrainingModel(base, heads, objective=objective),
        training_arguments(tmp_path, {**SETTINGS, **settings}, defaults=BlockRecipe.defaults),
        train_dataset=ExampleDataset(rows),
        eval_dataset=ExampleDataset(rows),
    )
    trainer.train()
    metrics = trainer.evaluate()
    chain = {"width": 1, "branches": 1, "num_draft_tokens": 4, "min_probability": 0.0}
    for options, name in ((chain, "estimated_tau"), ({}, "estimated_tree_tau")):
        proposer = BlockProposer(heads.eval(), target=base, **options)
        spec = SpecModel(base, proposer, adaptive=False)
        spec.generate(**inputs, **limit)
        assert metrics[f"eval_{name}"] > 1.1
        assert spec.last_speculation.tau == pytest.approx(metrics[f"eval_{name}"], rel=NEAR)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
def test_new_heads_start_as_layers_of_the_base_whose_keys_they_give(family):
    base = build_model(family, num_hidden_layers=5)
    heads = new_block_heads(base, kind="dspark", num_layers=1, feature_layers=(1, 3))
    heads.eval()
    mine, theirs = heads.layers[0], base.get_decoder().layers[3]
    assert torch.equal(mine.mlp.up_proj.weight, theirs.mlp.up_proj.weight)
    assert torch.equal(heads.norm.weight, base.get_decoder().norm.weight)
    tokens = prompts(6)["input_ids"]
    output = base(tokens, output_hidden_states=True, use_cache=True)
    states = output.hidden_states
    keys, values = heads.context(
        torch.cat((states[1], states[3]), -1), heads.rotation(torch.arange(6)[None])
    )
    wanted = output[CACHE_NAME].layers[3]
    near = torch.nn.functional.cosine_similarity
    assert near(keys[0], wanted.keys, dim=-1).mean() > 0.95
    assert near(values[0], wanted.values, dim=-1).mean() > 0.95


@pytest.mark.parametrize("family", ["phi3", "gemma3_text"])  # joined maps, and other norms
def test_heads_start_at_random_where_the_bases_layers_have_other_parts(family, caplog):
    base = build_family(family)
    with caplog.at_level("INFO"):
        heads = new_block_heads(base, kind="dspark", num_layers=1, feature_layers=(0,))
    assert "start at random" in caplog.text
    assert heads.layers[0].mlp.up_proj.weight.std() < 0.03


def test_layers_are_not_copied_when_that_is_switched_off():
    heads = new_block_heads(small_base(), kind="dspark", num_layers=1, copies_layers=False)
    assert heads.norm.weight.eq(1).all()
    assert heads.layers[0].mlp.up_proj.weight.std() < 0.03


@pytest.mark.parametrize("other", [torch.nn.Identity(), torch.nn.LayerNorm(12)])
def test_heads_start_at_random_next_to_norms_of_heads_of_another_kind(other):
    base = build_model("qwen3", num_hidden_layers=4)
    for layer in base.get_decoder().layers:
        layer.self_attn.k_norm = other
    heads = new_block_heads(base, kind="dspark", num_layers=1, feature_layers=(2,))
    assert heads.norm.weight.eq(1).all()
    assert heads.layers[0].mlp.up_proj.weight.std() < 0.03
