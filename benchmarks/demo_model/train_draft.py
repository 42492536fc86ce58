"""Train a small draft model on the answers that ``distill.py`` wrote."""

import argparse
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from agreement import measure
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from speclm.files.json_lines import parse_json_lines

PROMPT_SHARE = 0.1  # of the prompt positions take part in a step, with hard targets


@dataclass(frozen=True, slots=True)
class Sample:
    """One answered prompt and what the base thought at every position of the answer."""

    token_ids: Tensor  # [seq], prompt and answer
    prompt_length: int
    top_ids: Tensor  # [answer, k]
    top_probs: Tensor  # [answer, k], rows sum to 1


def read_samples(folder: Path) -> list[Sample]:
    """Read every finished shard of a folder."""
    samples = []
    for path in sorted(folder.glob("*.jsonl")):
        tensors = load_file(path.with_suffix(".safetensors"))
        top_probs = tensors["log_probs"].float().softmax(-1)
        top_ids = tensors["ids"]
        start = 0
        for row in parse_json_lines(path):
            stop = start + len(row["answer_ids"])
            samples.append(
                Sample(
                    token_ids=torch.tensor(row["prompt_ids"] + row["answer_ids"]),
                    prompt_length=len(row["prompt_ids"]),
                    top_ids=top_ids[start:stop],
                    top_probs=top_probs[start:stop],
                )
            )
            start = stop
    return samples


def batches(folder: Path, *, batch_tokens: int, rng: random.Random) -> Iterator[list[Sample]]:
    """Yield batches of similar length for ever; each pass takes up the shards added meanwhile."""
    while True:
        samples = read_samples(folder)
        # Jitter keeps similar lengths together without the same batches in every pass.
        samples.sort(key=lambda sample: len(sample.token_ids) * rng.uniform(0.9, 1.1))
        groups: list[list[Sample]] = [[]]
        longest = 0
        for sample in samples:
            longest = max(longest, len(sample.token_ids))
            if longest * (len(groups[-1]) + 1) > batch_tokens:
                groups.append([])
                longest = len(sample.token_ids)
            groups[-1].append(sample)
        rng.shuffle(groups)
        yield from groups


def distillation_loss(
    draft: PreTrainedModel, batch: list[Sample], *, hard_weight: float
) -> tuple[Tensor, float]:
    """Return the loss of one batch and its soft cross-entropy per answer token.

    Answer positions are compared with the base's likeliest tokens, and with its single best one
    at ``hard_weight``. Padding is on the right, where causal attention never looks.
    """
    input_ids = pad_sequence([sample.token_ids for sample in batch], batch_first=True)
    hidden = draft.base_model(input_ids, use_cache=False).last_hidden_state  # [batch, seq, hidden]
    is_answer = torch.zeros(input_ids.shape, dtype=torch.bool)
    is_prompt = torch.zeros(input_ids.shape, dtype=torch.bool)
    for row, sample in enumerate(batch):
        first = sample.prompt_length - 1
        is_answer[row, first : len(sample.token_ids) - 1] = True
        is_prompt[row, :first] = True
    is_prompt &= torch.rand(input_ids.shape) < PROMPT_SHARE

    log_probs = draft.lm_head(hidden[is_answer]).log_softmax(-1)  # [answers, vocab]
    top_ids = torch.cat([sample.top_ids for sample in batch]).long()  # [answers, k]
    top_probs = torch.cat([sample.top_probs for sample in batch])
    top_log_probs = log_probs.gather(1, top_ids)
    soft = -(top_probs * top_log_probs).sum(-1).mean()
    hard = -top_log_probs[:, 0].mean()
    prompt = F.cross_entropy(
        draft.lm_head(hidden[is_prompt]), input_ids.roll(-1, dims=1)[is_prompt], reduction="sum"
    ) / len(top_ids)
    loss = (1 - hard_weight) * soft + hard_weight * hard + prompt
    return loss, soft.item()


def new_draft(base: PreTrainedModel, args: argparse.Namespace) -> LlamaForCausalLM:
    """Build a draft model whose embedding starts as the base's leading principal components."""
    config = LlamaConfig(
        vocab_size=base.config.vocab_size,
        hidden_size=args.hidden_size,
        intermediate_size=args.intermediate_size,
        num_hidden_layers=args.num_layers,
        num_attention_heads=args.num_heads,
        num_key_value_heads=args.num_heads,
        head_dim=args.head_dim,
        max_position_embeddings=base.config.max_position_embeddings,
        rope_parameters=base.config.rope_parameters,
        rms_norm_eps=base.config.rms_norm_eps,
        tie_word_embeddings=True,
        bos_token_id=base.config.bos_token_id,
        eos_token_id=base.config.eos_token_id,
        pad_token_id=base.config.pad_token_id,
    )
    draft = LlamaForCausalLM(config)
    embedding = base.get_input_embeddings().weight.detach()  # [vocab, hidden]
    left, scale, _ = torch.linalg.svd(embedding, full_matrices=False)
    components = (left * scale)[:, : args.hidden_size]
    draft.get_input_embeddings().weight.data.copy_(components)
    return draft


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Rise linearly over the first steps, then follow a cosine down to zero."""
    if step < args.warmup_steps:
        return float(args.learning_rate * (step + 1) / args.warmup_steps)
    progress = (step - args.warmup_steps) / max(args.steps - args.warmup_steps, 1)
    return float(args.learning_rate * 0.5 * (1 + math.cos(math.pi * progress)))


def report(draft: PreTrainedModel, base: PreTrainedModel, held_out: Path) -> None:
    """Print how far the draft follows the base on each held-out shard."""
    for shard in sorted(held_out.glob("*.jsonl")):
        figures = measure(draft, base, [shard])
        print(
            f"  {shard.stem}: per token {figures.per_token:.3f}, tau {figures.tau:.2f}", flush=True
        )


def save(draft: PreTrainedModel, args: argparse.Namespace) -> None:
    """Write a bf16 copy with the base's tokenizer and generation settings."""
    copy = LlamaForCausalLM(draft.config)
    copy.load_state_dict(draft.state_dict())
    copy.generation_config = GenerationConfig.from_pretrained(args.base)
    copy.to(torch.bfloat16).save_pretrained(args.out)
    AutoTokenizer.from_pretrained(args.base).save_pretrained(args.out)


def train(draft: PreTrainedModel, base: PreTrainedModel, args: argparse.Namespace) -> None:
    """Run the optimiser for ``args.steps`` steps, saving and reporting on the way."""
    decayed = [weight for weight in draft.parameters() if weight.ndim > 1]
    plain = [weight for weight in draft.parameters() if weight.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}],
        betas=(0.9, 0.98),
    )
    stream = batches(args.answers, batch_tokens=args.batch_tokens, rng=random.Random(args.seed))
    started = time.perf_counter()
    recent: list[float] = []
    for step in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args)
        loss, soft = distillation_loss(draft, next(stream), hard_weight=args.hard_weight)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(draft.parameters(), 1.0)
        optimizer.step()
        recent.append(soft)
        if (step + 1) % 100 == 0:
            seconds = time.perf_counter() - started
            mean = sum(recent) / len(recent)
            print(f"step {step + 1}: soft loss {mean:.4f}, {seconds:.0f} s", flush=True)
            recent.clear()
        if (step + 1) % args.report_every == 0 or step + 1 == args.steps:
            report(draft.eval(), base, args.held_out)
            save(draft, args)
            draft.train()


def main() -> None:
    """Parse the command line, train, and write the draft model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", type=Path, help="folder of the base model")
    parser.add_argument("answers", type=Path, help="folder of shards to train on")
    parser.add_argument("held_out", type=Path, help="folder of shards to report on")
    parser.add_argument("out", type=Path, help="folder for the draft model")
    parser.add_argument("--start", type=Path, help="draft model to go on from")
    parser.add_argument("--hidden-size", type=int, default=112)
    parser.add_argument("--intermediate-size", type=int, default=256)
    parser.add_argument("--num-layers", type=int, default=2)
    parser.add_argument("--num-heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=32)
    parser.add_argument("--steps", type=int, default=12000)
    parser.add_argument("--warmup-steps", type=int, default=200)
    parser.add_argument("--batch-tokens", type=int, default=1024)
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--hard-weight", type=float, default=0.2)
    parser.add_argument("--report-every", type=int, default=2000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    base = AutoModelForCausalLM.from_pretrained(args.base, dtype=torch.float32)
    if args.start is None:
        draft = new_draft(base, args)
    else:
        draft = LlamaForCausalLM.from_pretrained(args.start, dtype=torch.float32).train()
    print(f"{draft.num_parameters():,} parameters", flush=True)
    train(draft, base, args)


if __name__ == "__main__":
    main()
