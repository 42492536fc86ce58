import importlib.util
from pathlib import Path

import pytest
import torch
from fastapi import HTTPException
from litserve.specs.openai import ChatCompletionRequest
from transformers import AutoModelForCausalLM, AutoTokenizer

from speclm.demo import assets, load_prompts

EXAMPLE = Path(__file__).parents[2] / "examples" / "litserve_app.py"


@pytest.fixture(scope="module")
def app():
    spec = importlib.util.spec_from_file_location(EXAMPLE.stem, EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    app = module.SpecChat(str(assets()["base"]), str(assets()["eagle3"]))
    app.spec.pre_setup(app)  # checks what the app has
    app.setup("cpu")
    app.model.float()  # without near ties
    return app


def ask(app, messages, **options):
    """Answer a request as litserve does, without its processes."""
    request = ChatCompletionRequest(messages=messages, **options)
    context = request.model_dump(exclude={"messages"})
    chunks = app.spec.encode_response(app.predict(app.spec.decode_request(request), context))
    return "".join(chunk["content"] for chunk in chunks)


def test_app_answers_with_the_text_of_regular_generation(app):
    messages = load_prompts("sql_dev", limit=1)[0]
    tokenizer = AutoTokenizer.from_pretrained(app.base)
    base = AutoModelForCausalLM.from_pretrained(app.base, dtype=torch.float32)
    prompt = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    for temperature in (0.0, 0.8):
        options = {"max_new_tokens": 16, "do_sample": temperature > 0}
        torch.manual_seed(0)
        if options["do_sample"]:
            options["temperature"] = temperature
        tokens = base.generate(**prompt, **options)[0, prompt["input_ids"].shape[1] :]
        torch.manual_seed(0)
        found = ask(app, messages, max_completion_tokens=16, temperature=temperature)
        assert found == tokenizer.decode(tokens, skip_special_tokens=True)
        assert app.model.last_speculation.total.num_draft_tokens > 0


def test_app_answers_a_wrong_request_with_the_message(app):
    messages = [{"role": "user", "content": "a " * 3000}]
    with pytest.raises(HTTPException, match="max_position_embeddings 2048"):
        ask(app, messages, max_tokens=4, temperature=0.0)
