import json

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.mtp import train_hybrid
from speclm import SpecModel

CONVERSATION = [
    {"role": "user", "content": "How many?"},
    {"role": "assistant", "content": "SELECT COUNT(rank) FROM table_991 WHERE bronze = 3"},
]
SIZES = {"hidden-size": 64, "intermediate-size": 64, "num-layers": 4, "learning-rate": 0.01}
OPTIONS = {**SIZES, "held-out": 1, "warmup-steps": 1, "save-minutes": 9}


def test_a_memorised_answer_is_drafted_by_the_layer_that_was_trained_with_the_base(
    tmp_path, capsys
):
    data, out = tmp_path / "data.jsonl", tmp_path / "hybrid"
    data.write_text(3 * (json.dumps({"messages": CONVERSATION}) + "\n"))
    arguments = ["--data", str(data), "--out", str(out)]
    arguments += [f"--{name}={value}" for name, value in OPTIONS.items()]
    for steps in (5, 40):  # the second run goes on from the first
        train_hybrid.main([*arguments, "--steps", str(steps)])
    assert "step 50" not in capsys.readouterr().out

    base = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(out)
    inputs = tokenizer.apply_chat_template(
        CONVERSATION[:1], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    model = SpecModel.from_pretrained(base, "mtp", adaptive=False)
    found = model.generate(**inputs, max_new_tokens=48, do_sample=False)
    assert torch.equal(found, base.generate(**inputs, max_new_tokens=48, do_sample=False))
    text = tokenizer.decode(found[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert text == CONVERSATION[1]["content"]
    assert model.last_speculation.tau > 4
