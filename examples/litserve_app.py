"""Serve a model with drafts from an app of your own: python examples/litserve_app.py BASE HEADS.

Needs ``pip install litserve``. Clients of OpenAI find it at http://localhost:8000/v1.
"""

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import litserve
from fastapi import HTTPException
from transformers import AutoTokenizer, TextIteratorStreamer

from speclm import SpeclmError, SpecModel


class SpecChat(litserve.LitAPI):
    """Answers chat completions, whole or streamed."""

    def __init__(self, base: str, heads: str) -> None:
        super().__init__(spec=litserve.OpenAISpec())
        self.base, self.heads = base, heads

    def setup(self, device: str) -> None:
        """Load the model, in a process of its own."""
        self.tokenizer = AutoTokenizer.from_pretrained(self.base)
        self.model = SpecModel.from_pretrained(self.base, self.heads, dtype="auto").to(device)

    def predict(self, request: Any, context: dict[str, Any]) -> Iterator[str]:
        """Yield the text of the answer while it is generated."""
        messages = [{"role": each.role, "content": each.content} for each in request.messages]
        prompt = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(self.model.device)
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        limit = context["max_completion_tokens"] or context["max_tokens"] or 512
        options = {"max_new_tokens": limit, "do_sample": context["temperature"] > 0}
        if options["do_sample"]:
            options |= {"temperature": context["temperature"], "top_p": context["top_p"]}
        with ThreadPoolExecutor(1) as thread:
            call = thread.submit(self.model.generate, **prompt, **options, streamer=streamer)
            call.add_done_callback(lambda _: streamer.end())  # also after an error
            yield from streamer
            try:
                call.result()
            except SpeclmError as error:
                raise HTTPException(400, str(error)) from error


if __name__ == "__main__":
    litserve.LitServer(SpecChat(*sys.argv[1:3]), timeout=False).run(
        port=8000, generate_client_file=False
    )
