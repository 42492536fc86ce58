"""Train a tiny Qwen3-Next base from scratch, together with its multi-token prediction layer.

The base has three layers with a recurrent state for every layer of attention, the tokenizer and
chat template of the bundled base, and tied embeddings that start as principal components of its
embeddings. Its one MTP layer is applied to its own output for further steps. Both are trained on
the answers of conversations, in one run:

    PYTHONPATH=. python benchmarks/mtp/train_hybrid.py --data sql.jsonl --out hybrid --minutes 14

The folder is a checkpoint as Qwen publishes them, with `mtp.*` next to `model.*`. A run that was
stopped goes on from its last save.
"""

import argparse
import copy
import math
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save
from torch import Tensor, nn
from transformers import AutoTokenizer, DynamicCache, GenerationConfig
from transformers.models.qwen3_next import Qwen3NextConfig, Qwen3NextForCausalLM

from speclm.cache import CACHE_NAME
from speclm.demo.bundle import assets
from speclm.files.atomic import write_file
from speclm.training.conversations import Example
from speclm.training.dataset import collate_examples, load_examples

PROMPT_SHARE = 0.15  # of the prompt's tokens take part in a step
STEP_WEIGHT = 0.6  # of an MTP step relative to the one before
NUM_STEPS = 3
HEAD_DIM = 32
STATE = "training.pt"


class Mtp(nn.Module):
    """An MTP layer whose tensors are named as in the checkpoints of Qwen."""

    def __init__(self, base: Qwen3NextForCausalLM) -> None:
        """Create a layer of attention of the base's classes, with random weights."""
        super().__init__()
        config = copy.deepcopy(base.config)
        config.num_hidden_layers, config.layer_types = 1, ["full_attention"]
        width, eps = config.hidden_size, config.rms_norm_eps
        norm, layer = type(base.model.norm), type(base.model.layers[-1])
        self.config, self.rotary = config, [base.model.rotary_emb]  # in a list: has no weights
        self.fc = nn.Linear(2 * width, width, bias=False)
        self.pre_fc_norm_embedding, self.pre_fc_norm_hidden = norm(width, eps), norm(width, eps)
        self.layers = nn.ModuleList([layer(config, 0)])
        self.norm = norm(width, eps)
        self.apply(base._init_weights)

    def forward(
        self, hidden: Tensor, embeddings: Tensor, positions: Tensor, mask: Tensor, cache: Any
    ) -> Tensor:
        """Return output states ``[batch, seq, hidden]`` for positions ``[seq]``.

        Args:
            hidden: States of the base, or outputs of this layer, before each token.
            embeddings: Embeddings of the tokens.
            positions: Their positions.
            mask: True where a position sees one that is cached, the new ones included.
            cache: Keys and values of the steps before.
        """
        parts = [self.pre_fc_norm_embedding(embeddings), self.pre_fc_norm_hidden(hidden)]
        states = self.layers[0](
            self.fc(torch.cat(parts, dim=-1)),
            position_embeddings=self.rotary[0](hidden, positions[None]),
            attention_mask=mask[None, None],
            **{CACHE_NAME: cache},
        )
        return self.norm(states)  # type: ignore[no-any-return]


def new_base(options: argparse.Namespace, tokenizer: Any) -> Qwen3NextForCausalLM:
    """Return a base with random weights."""
    num_heads = options.hidden_size // HEAD_DIM // 2
    config = Qwen3NextConfig(
        vocab_size=len(tokenizer),
        hidden_size=options.hidden_size,
        intermediate_size=options.intermediate_size,
        num_hidden_layers=options.num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=max(1, num_heads // 2),
        head_dim=2 * HEAD_DIM,
        linear_key_head_dim=HEAD_DIM,
        linear_value_head_dim=HEAD_DIM,
        linear_num_key_heads=num_heads,
        linear_num_value_heads=num_heads,
        num_experts=0,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    base = Qwen3NextForCausalLM(config)
    base.get_input_embeddings().weight.data.copy_(_embeddings(options.hidden_size))
    base.generation_config = GenerationConfig.from_pretrained(assets()["base"])
    return base


def _embeddings(width: int) -> Tensor:
    """Return the leading principal components of the bundled base's embeddings, as a start."""
    whole = load_file(assets()["base"] / "model.safetensors")["model.embed_tokens.weight"].float()
    directions = torch.linalg.eigh(whole.T @ whole).eigenvectors.flip(1)
    return whole @ directions[:, :width]  # [vocab, width]


def losses(
    base: Qwen3NextForCausalLM, mtp: Mtp, batch: dict[str, Tensor]
) -> tuple[Tensor, list[float]]:
    """Return the cross-entropies of the base and of each MTP step.

    A step starts at every position of an answer. It sees the first step's keys up to there, and
    those of the later steps on its own way, as in decoding.

    Returns:
        ``[1 + steps]``, and without gradients also the shares of answer tokens guessed right.
    """
    ids, is_answer = batch["input_ids"], batch["loss_mask"]
    length = ids.shape[1]
    embeddings = base.model.embed_tokens(ids)
    states = base.model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
    is_label = batch["attention_mask"].bool() & (torch.rand(ids.shape) < PROMPT_SHARE) | is_answer
    is_label[:, 0] = False
    logits, labels = base.lm_head(states[:, :-1][is_label[:, 1:]]), ids[is_label]
    found = [F.cross_entropy(logits, labels, reduction="sum") / is_answer.sum()]
    rights = []
    if not torch.is_grad_enabled():
        rights.append(_share(logits, labels, is_answer[is_label]))

    # Step k at position i reads token i + k and guesses the one after it.
    first = max(0, int(is_answer.int().argmax(1).min()) - 1)
    cache, positions = DynamicCache(config=mtp.config), torch.arange(length)
    mask = positions[:, None] >= positions  # [seq, slots]
    for step in range(1, NUM_STEPS + 1):
        read, guessed = positions + step, positions + step + 1
        inputs = embeddings[:, read.clamp(max=length - 1)]
        states = mtp(states, inputs, positions + step - 1, mask, cache)
        if step == 1:
            positions, mask, guessed = positions[first:], mask[first:], guessed[first:]
            states = states[:, first:]
        mask = torch.cat([mask, torch.eye(len(positions), dtype=torch.bool)], dim=1)
        is_counted = F.pad(is_answer, (0, NUM_STEPS + 1))
        is_counted = is_counted[:, positions + 1] & is_counted[:, guessed]
        logits = base.lm_head(states[is_counted])
        labels = ids[:, guessed.clamp(max=length - 1)][is_counted]
        found.append(F.cross_entropy(logits, labels))
        if not torch.is_grad_enabled():
            rights.append(_share(logits, labels, torch.ones_like(labels, dtype=torch.bool)))
    return torch.stack(found), rights


def _share(logits: Tensor, labels: Tensor, is_counted: Tensor) -> float:
    return (logits.argmax(-1) == labels)[is_counted].float().mean().item()


def make_batches(
    examples: Sequence[Example], *, num_tokens: int, seed: int
) -> Iterator[list[Example]]:
    """Yield batches of similar lengths for ever."""
    rng = random.Random(seed)
    while True:
        order = sorted(examples, key=lambda row: len(row["input_ids"]) * rng.uniform(0.9, 1.1))
        batches: list[list[Example]] = [[]]
        longest = 0
        for row in order:
            longest = max(longest, len(row["input_ids"]))
            if longest * (len(batches[-1]) + 1) > num_tokens:
                batches.append([])
                longest = len(row["input_ids"])
            batches[-1].append(row)
        rng.shuffle(batches)
        yield from batches


@torch.no_grad()
def report(base: Qwen3NextForCausalLM, mtp: Mtp, rows: Sequence[Example]) -> None:
    """Print how often the base and the MTP steps guess the tokens of held-out answers."""
    base.eval()
    _, rights = losses(base, mtp, collate_examples(rows))
    shares = " ".join(f"{right:.3f}" for right in rights)
    print(f"  held out, right by the base and by MTP steps: {shares}", flush=True)
    base.train()


class Run:
    """A training run, whose time is that of the processor, so that pauses do not count."""

    def __init__(self, options: argparse.Namespace) -> None:
        """Start a run, or take up the one in the folder of the output."""
        self.options = options
        self.tokenizer = AutoTokenizer.from_pretrained(assets()["base"])
        self.base = new_base(options, self.tokenizer)
        self.mtp = Mtp(self.base)
        weights = [*self.base.parameters(), *self.mtp.parameters()]
        matrices = [weight for weight in weights if weight.ndim > 1]
        others = [weight for weight in weights if weight.ndim == 1]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0}]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
        self.num_steps, self.seconds = 0, 0.0
        state = options.out / STATE
        if state.exists():
            saved = torch.load(state)
            self.optimizer.load_state_dict(saved["optimizer"])
            self.num_steps, self.seconds = saved["num_steps"], saved["seconds"]
            tensors = load_file(options.out / "model.safetensors")
            self.mtp.load_state_dict(
                {key[4:]: tensors.pop(key) for key in list(tensors) if key.startswith("mtp.")}
            )
            self.base.load_state_dict(tensors, strict=False)  # without the tied output matrix
        print(f"{sum(map(torch.numel, weights)):,} parameters", flush=True)

    def save(self) -> None:
        """Write the checkpoint and what a later process needs to go on."""
        out = self.options.out
        self.base.save_pretrained(out)
        self.tokenizer.save_pretrained(out)
        tensors = load_file(out / "model.safetensors")
        tensors |= {f"mtp.{name}": tensor for name, tensor in self.mtp.state_dict().items()}
        write_file(out / "model.safetensors", save(tensors, metadata={"format": "pt"}))
        state = {
            "optimizer": self.optimizer.state_dict(),
            "num_steps": self.num_steps,
            "seconds": self.seconds,
        }
        torch.save(state, out / f"{STATE}.new")
        (out / f"{STATE}.new").replace(out / STATE)

    def learning_rate(self) -> float:
        """Return the rate: linear at first, then a cosine over the time that is left."""
        share = min(1.0, self.seconds / (60 * self.options.minutes))
        warmup = min(1.0, (self.num_steps + 1) / self.options.warmup_steps)
        cosine = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * share))
        return float(self.options.learning_rate * warmup * cosine)

    def train(self, rows: Sequence[Example], held_out: Sequence[Example]) -> None:
        """Minimise the sum of all losses until the time is over."""
        options, start = self.options, time.process_time() - self.seconds
        seed = options.seed + self.num_steps
        torch.manual_seed(seed)
        weights = [weight for group in self.optimizer.param_groups for weight in group["params"]]
        scale = torch.tensor([STEP_WEIGHT**step for step in range(NUM_STEPS + 1)])
        means, saved, num_tokens = torch.zeros(NUM_STEPS + 1), self.seconds, 0
        for rows_of_step in make_batches(rows, num_tokens=options.batch_tokens, seed=seed):
            batch = collate_examples(rows_of_step)
            for group in self.optimizer.param_groups:
                group["lr"] = self.learning_rate()
            with torch.autocast("cpu", torch.bfloat16):  # twice as fast where the CPU has it
                found, _ = losses(self.base, self.mtp, batch)
            self.optimizer.zero_grad()
            (found @ scale).backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            self.optimizer.step()
            self.num_steps += 1
            self.seconds = time.process_time() - start
            num_tokens += int(batch["attention_mask"].sum())
            means += found.detach() / options.report_every
            if self.num_steps % options.report_every == 0:
                shares = " ".join(f"{loss:.3f}" for loss in means.tolist())
                print(f"step {self.num_steps}, {self.seconds / 60:.1f} min: {shares}", flush=True)
                means.zero_()
            is_over = self.seconds >= 60 * options.minutes or self.num_steps == options.steps
            if is_over or self.seconds >= saved + 60 * options.save_minutes:
                print(f"  {num_tokens / (self.seconds - saved):.0f} tokens/s", flush=True)
                report(self.base, self.mtp, held_out)
                self.save()
                saved, num_tokens = self.seconds, 0
            if is_over:
                return


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="conversations")
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--minutes", type=float, default=14, help="time of the processor")
    parser.add_argument("--steps", type=int, help="end after so many steps, if that is earlier")
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--intermediate-size", type=int, default=384)
    parser.add_argument("--num-layers", type=int, default=12, help="every fourth has attention")
    parser.add_argument("--max-length", type=int, default=128, help="longer rows are left out")
    parser.add_argument("--held-out", type=int, default=200, help="last rows of each file")
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--warmup-steps", type=int, default=100)
    parser.add_argument("--report-every", type=int, default=50)
    parser.add_argument("--save-minutes", type=float, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)

    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    options.out.mkdir(parents=True, exist_ok=True)
    run = Run(options)
    rows: list[Example] = []
    held_out: list[Example] = []
    for path in options.data:
        found = list(load_examples(path, run.tokenizer))
        found = [row for row in found if len(row["input_ids"]) <= options.max_length]
        rows += found[: -options.held_out]
        held_out += found[-options.held_out :]
    print(f"{len(rows)} conversations", flush=True)
    run.train(rows, held_out[: options.held_out])


if __name__ == "__main__":
    main()
