"""Compare ways to rank draft candidates under sampling, by tokens per target forward.

Regular generation generates once. Every method then drafts along these tokens, with the noise that
chose them, and counts how far they follow its trees. These are the rounds of `generate`, without
the cost of a forward of the target.

    python benchmarks/trees/ranking.py --set both --n 30 --setting t1.0
"""

import argparse
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything needed is bundled

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from speclm.acceptance import Accepted
from speclm.bench.decoders import SETTINGS, Call, make_calls, setting_options, until_end
from speclm.bench.pairs import Spread
from speclm.bench.records import Record, append_record, is_recorded
from speclm.demo.bundle import assets, load_prompts
from speclm.drafting.interface import Draft, Prefill, Proposer
from speclm.drafting.mixture import Mixture
from speclm.methods.draft_model.proposer import DraftModelProposer
from speclm.sampling import PositionNoise

BATCH = 10
METHODS = ("top-k", "fixed mixture", "estimated mixture")

# By the number of draft tokens of a tree: nodes expanded at a level, children of each, and levels.
TREE_SHAPES = {8: (3, 3, 6), 16: (4, 4, 8), 32: (8, 6, 8)}


def follow(draft: Draft, row: int, text: Sequence[int]) -> tuple[list[int], list[int]]:
    """Return the path along a text that is left in a draft, and the tokens emitted on it."""
    parents, tokens = draft.topology.host_parents, draft.tokens[row].tolist()
    shape = parents[row if len(parents) > 1 else 0]
    path, emitted = [0], [text[0]]
    for token in text[1:]:
        child = next(
            (
                node
                for node in range(path[-1] + 1, len(shape))
                if shape[node] == path[-1] and tokens[node] == emitted[-1]
            ),
            None,
        )
        if child is None:
            break
        path.append(child)
        emitted.append(token)
    return path, emitted


@torch.no_grad()
def replay(
    proposer: Proposer, call: Call, texts: Sequence[Sequence[int]], *, is_coupled: bool
) -> list[int]:
    """Return how many tokens every row of every round was given; the first round is left out."""
    torch.manual_seed(call.seed)
    batch, device = len(texts), call.input_ids.device
    vocab_size = proposer.needs.vocab_size
    assert vocab_size is not None
    noise = PositionNoise(batch=batch, vocab_size=vocab_size, device=device)
    roots, done = call.input_ids[:, -1], [0] * batch
    proposer.begin(
        Prefill(
            tokens=call.input_ids[:, :-1],
            num_padding=(call.attention_mask == 0).sum(1),
            first_tokens=roots,
            temperature=call.options["temperature"],
            max_new_tokens=max(map(len, texts)),
            eos_token_ids=call.eos_token_ids,
        )
    )
    lengths: list[list[int]] = []
    while any(num < len(text) for num, text in zip(done, texts, strict=True)):
        noise.seek(done, live=[num < len(text) for num, text in zip(done, texts, strict=True)])
        draft = proposer.propose(roots, noise=noise if is_coupled else None)
        paths: list[list[int]] = [[] for _ in texts]
        emitted: list[list[int]] = [[] for _ in texts]
        for row, text in enumerate(texts):
            if done[row] < len(text):
                paths[row], emitted[row] = follow(draft, row, text[done[row] :])
        done = [num + len(new) for num, new in zip(done, emitted, strict=True)]
        lengths.append([len(new) for new in emitted if new])
        proposer.commit(Accepted.from_host(paths, emitted, device=device))
        last = [new[-1] if new else int(root) for new, root in zip(emitted, roots, strict=True)]
        roots = torch.tensor(last, device=device)
    return [num for row in lengths[1:] for num in row]


def draft_model_maker(base: PreTrainedModel) -> Callable[..., Proposer]:
    """Return a builder of draft-model proposers with that many draft tokens."""
    draft = AutoModelForCausalLM.from_pretrained(assets()["draft"], dtype=base.dtype)

    def make(num_nodes: int, shape: tuple[int, int, int], mixture: Mixture | None) -> Proposer:
        width, branches, depth = shape
        # Every method drafts as many nodes: nothing is pruned for being unlikely.
        return DraftModelProposer(
            draft,
            target=base,
            depth=depth,
            num_draft_tokens=num_nodes,
            width=width,
            branches=branches,
            min_probability=0.0,
            min_confidence=0.0,
            min_growing=0.0,
            mixture=mixture,
        )

    return make


def plain_texts(base: PreTrainedModel, calls: Sequence[Call]) -> list[list[list[int]]]:
    """Return regular generation's new tokens of every call, up to each row's end."""
    texts = []
    for call in calls:
        torch.manual_seed(call.seed)
        new = base.generate(**call.arguments)[:, call.input_ids.shape[1] :].tolist()
        texts.append([until_end(row, call.eos_token_ids) for row in new])
    return texts


def measure(
    base: PreTrainedModel,
    make: Callable[..., Proposer],
    calls: Sequence[Call],
    *,
    nodes: Sequence[int],
    shape: tuple[int, int, int] | None,
    settings: dict[str, Any],
    path: Path | None,
) -> Iterator[Record]:
    """Measure every method on one set of prompts, and record what was not recorded yet."""
    texts: list[list[list[int]]] | None = None
    for num_nodes in nodes:
        for method in METHODS:
            width, branches, depth = shape or TREE_SHAPES[num_nodes]
            named = {
                **settings,
                "num_nodes": num_nodes,
                "width": width,
                "branches": branches,
                "depth": depth,
                "method": method,
            }
            if path is not None and is_recorded(path, benchmark="ranking", settings=named):
                continue
            texts = plain_texts(base, calls) if texts is None else texts
            mixture = None if method == "estimated mixture" else Mixture()
            proposer = make(num_nodes, (width, branches, depth), mixture)
            lengths = [
                replay(proposer, call, rows, is_coupled=method != "top-k")
                for call, rows in zip(calls, texts, strict=True)
            ]
            taus = Spread.of([sum(found) / len(found) for found in lengths if found])
            record = Record(
                benchmark="ranking",
                settings=named,
                unit="tokens per target forward",
                n=len(calls),
                median=taus.median,
                lower_quartile=taus.lower_quartile,
                upper_quartile=taus.upper_quartile,
                promises_identity=False,
                num_identical=None,
                divergences=[],
                tau=sum(map(sum, lengths)) / sum(map(len, lengths)),
            )
            if path is not None:
                append_record(path, record)
            yield record


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--set", choices=("sql", "gsm8k", "both"), default="both")
    parser.add_argument("--n", type=int, default=30, help="prompts of each set")
    parser.add_argument("--dev", action="store_true", help="report: not the prompts to tune with")
    sampled = [name for name, options in SETTINGS.items() if options["do_sample"]]
    parser.add_argument("--setting", choices=sampled, default="t1.0")
    parser.add_argument("--nodes", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--shape", type=int, nargs=3, help="nodes a level, children, levels")
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--out", type=Path, help="records; none by default")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args(arguments)


def main() -> None:
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    logging.disable_progress_bar()
    base = AutoModelForCausalLM.from_pretrained(assets()["base"], dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(assets()["base"])
    make = draft_model_maker(base)
    for name in ("sql", "gsm8k") if options.set == "both" else (options.set,):
        prompts = f"{name}_{'dev' if options.dev else 'tune'}"
        chosen = {
            **setting_options(options.setting),
            "max_new_tokens": options.max_new_tokens,
        }
        calls = make_calls(
            load_prompts(prompts, limit=options.n), base, tokenizer, options=chosen, batch=BATCH
        )
        settings = {
            "prompts": prompts,
            "num_prompts": options.n,
            "setting": options.setting,
            "drafter": "draft",
            "max_new_tokens": options.max_new_tokens,
            "dtype": "float32",
            "device": base.device.type,
        }
        shape = None if options.shape is None else tuple(options.shape)
        for record in measure(
            base, make, calls, nodes=options.nodes, shape=shape, settings=settings, path=options.out
        ):
            found = record.settings
            print(
                f"{found['prompts']} {found['setting']} {found['num_nodes']:3d} nodes "
                f"{found['width']}x{found['branches']}x{found['depth']} {found['method']:18s} "
                f"tau {record.tau:.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
