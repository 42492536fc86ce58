"""Let the base model answer training prompts, and keep what its draft model should imitate.

Every shard is two files: a JSONL of token ids and a safetensors file with the base's most likely
next tokens at each answer position. A shard that exists is skipped, so an interrupted run resumes.
"""

import argparse
import json
import random
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

TOP_K = 32


def encode_prompts(
    conversations: Path, base: Path, *, exclude_last: int, seed: int
) -> list[list[int]]:
    """Read conversations and encode each without its last turn, in shuffled order.

    Args:
        conversations: JSONL file, one ``{"messages": [...]}`` a row.
        base: Folder with the base's tokenizer and chat template.
        exclude_last: Rows at the end of the file that are held out.
        seed: Seed of the shuffle.
    """
    tokenizer = AutoTokenizer.from_pretrained(base)
    with conversations.open(encoding="utf-8") as lines:
        rows = [json.loads(line)["messages"][:-1] for line in lines]
    rows = rows[: len(rows) - exclude_last]
    random.Random(seed).shuffle(rows)
    return [
        tokenizer.apply_chat_template(row, add_generation_prompt=True, return_dict=True)[
            "input_ids"
        ]
        for row in rows
    ]


def answer_batch(
    model: PreTrainedModel, prompts: list[list[int]], *, temperature: float, max_new_tokens: int
) -> tuple[list[list[int]], list[Tensor], list[Tensor]]:
    """Answer one left-padded batch.

    Returns:
        For each prompt: the answer up to and with EOS, and at each of its positions the ``TOP_K``
        most likely ids and their log-probabilities before the temperature.
    """
    width = max(len(prompt) for prompt in prompts)
    pad_id, eos_id = model.config.pad_token_id, model.config.eos_token_id
    input_ids = torch.tensor([[pad_id] * (width - len(p)) + p for p in prompts])  # [batch, seq]
    attention_mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {}
    output = model.generate(
        input_ids,
        attention_mask=attention_mask,
        max_new_tokens=max_new_tokens,
        return_dict_in_generate=True,
        output_logits=True,
        **sampling,
    )
    best = [step.log_softmax(-1).topk(TOP_K) for step in output.logits]
    log_probs = torch.stack([step.values for step in best], dim=1)  # [batch, seq, TOP_K]
    ids = torch.stack([step.indices for step in best], dim=1)  # [batch, seq, TOP_K]
    answers = []
    for answer in output.sequences[:, width:].tolist():
        length = answer.index(eos_id) + 1 if eos_id in answer else len(answer)
        answers.append(answer[:length])
    return (
        answers,
        [row[: len(answer)] for row, answer in zip(ids, answers, strict=True)],
        [row[: len(answer)] for row, answer in zip(log_probs, answers, strict=True)],
    )


def write_shard(
    path: Path, model: PreTrainedModel, prompts: list[list[int]], args: argparse.Namespace
) -> None:
    """Answer the prompts of one shard and write its two files."""
    index = int(path.stem.rsplit("-", 1)[1])
    temperature = args.temperatures[index % len(args.temperatures)]
    torch.manual_seed(args.seed + index)
    prompts = sorted(prompts, key=len)
    rows: list[str] = []
    ids: list[Tensor] = []
    log_probs: list[Tensor] = []
    for start in range(0, len(prompts), args.batch_size):
        batch = prompts[start : start + args.batch_size]
        answers, batch_ids, batch_log_probs = answer_batch(
            model, batch, temperature=temperature, max_new_tokens=args.max_new_tokens
        )
        ids += batch_ids
        log_probs += batch_log_probs
        rows += [
            json.dumps({"temperature": temperature, "prompt_ids": prompt, "answer_ids": answer})
            for prompt, answer in zip(batch, answers, strict=True)
        ]
    tensors = {
        "ids": torch.cat(ids).to(torch.int16),
        "log_probs": torch.cat(log_probs).to(torch.float16),
    }
    save_file(tensors, path.with_suffix(".safetensors"))
    # The JSONL comes last, under its name only when whole: it marks the shard as finished.
    partial = path.with_suffix(".partial")
    partial.write_text("\n".join(rows) + "\n", encoding="utf-8")
    partial.rename(path)


def main() -> None:
    """Parse the command line and write the shards that are missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", type=Path, help="folder of the base model")
    parser.add_argument("conversations", type=Path, help="JSONL file with training conversations")
    parser.add_argument("out", type=Path, help="folder for the shards")
    parser.add_argument("--name", required=True, help="prefix of the shard files, such as sql")
    parser.add_argument("--limit", type=int, help="most prompts to answer")
    parser.add_argument("--exclude-last", type=int, default=200, help="rows to hold out")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 1.0, 0.0, 0.7])
    parser.add_argument("--max-new-tokens", type=int, default=200)
    parser.add_argument("--shard-size", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    prompts = encode_prompts(
        args.conversations, args.base, exclude_last=args.exclude_last, seed=args.seed
    )[: args.limit]
    model = AutoModelForCausalLM.from_pretrained(args.base, dtype=torch.float32)
    for index, start in enumerate(range(0, len(prompts), args.shard_size)):
        path = args.out / f"{args.name}-{index:04d}.jsonl"
        if not path.exists():
            write_shard(path, model, prompts[start : start + args.shard_size], args)
            print(f"{path.name}: written", flush=True)


if __name__ == "__main__":
    main()
