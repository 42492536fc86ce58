"""Options of the commands: one frozen dataclass per command, every shared option defined once.

This module imports nothing heavy: ``speclm --help`` and ``speclm COMMAND --help`` need no other
module.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

MAX_INT = 2**31 - 1
"""Largest value of an option that becomes a 32-bit integer."""

BUNDLED_HEADS = ("draft", "medusa", "eagle", "eagle3", "block")
"""Names of the bundled heads, which ``--heads`` accepts with the bundled base."""

Batch = Annotated[str, typer.Option(help="Rows per call; several sizes separated by commas.")]
MaxNewTokens = Annotated[
    int, typer.Option(min=1, max=MAX_INT, help="Maximum new tokens of each answer.")
]
NumPrompts = Annotated[int | None, typer.Option(min=1, help="Number of prompts to use.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of the base on the hub.")]
HeadsRevision = Annotated[
    str | None, typer.Option(help="Branch, tag or commit of heads or a draft model on the hub.")
]
HeadsSubfolder = Annotated[
    str | None, typer.Option(help="Folder of the heads inside their repository or folder.")
]
Tree = Annotated[
    str | None,
    typer.Option(help='"auto", a preset of a static tree, or a JSON file of speclm tune.'),
]
NumDraftTokens = Annotated[int | None, typer.Option(min=1, help="Maximum draft tokens per round.")]
Engine = Annotated[str, typer.Option(help="How trees are verified: auto, eager, compile or graph.")]
Corpus = Annotated[Path | None, typer.Option(help="Index of texts for look-ups; see speclm index.")]
TokenMap = Annotated[
    str | None,
    typer.Option(
        help="File of the tokens that EAGLE-1 heads draft, in their folder or elsewhere, or all; "
        "by default the only freq_*.pt in their folder."
    ),
]
CacheDir = Annotated[
    Path | None,
    typer.Option(help="Folder of downloads from the hub; by default that of huggingface_hub."),
]
Seed = Annotated[int, typer.Option(min=0, max=MAX_INT, help="Seed of sampling.")]
Threads = Annotated[int | None, typer.Option(min=1, max=1024, help="Threads of PyTorch.")]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOptions:
    """Options of every command that loads a base model."""

    base: Annotated[
        str | None, typer.Option(help="Folder or hub id; by default the bundled model.")
    ] = None
    revision: Revision = None
    cache_dir: CacheDir = None
    dtype: Annotated[
        str | None, typer.Option(help="Dtype of the weights: float32, bfloat16, float16 or auto.")
    ] = None
    device: Annotated[
        str | None, typer.Option(help="Such as cpu or cuda:1; by default a GPU if there is one.")
    ] = None
    device_map: Annotated[
        str | None, typer.Option(help="Spread the base over devices, for example auto.")
    ] = None
    quantization: Annotated[
        str | None,
        typer.Option(
            help="Quantise the base: bnb-4bit, bnb-8bit, quanto-int8, quanto-int4 or hqq-4bit."
        ),
    ] = None
    threads: Threads = None


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadsOptions(ModelOptions):
    """Options of every command that loads a method too."""

    heads: Annotated[
        str | None,
        typer.Option(
            help="Method name, folder or hub id of heads or of a draft model, module:Class of your "
            'own, several of these separated by commas, or "none".'
        ),
    ] = None
    heads_revision: HeadsRevision = None
    heads_subfolder: HeadsSubfolder = None
    imports: Annotated[
        list[str] | None,
        typer.Option(
            "--import", metavar="MODULE", help="Import a module that registers methods; repeatable."
        ),
    ] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftOptions(HeadsOptions):
    """Options of every command that drafts with a tree chosen by the user."""

    tree: Tree = None
    num_draft_tokens: NumDraftTokens = None
    depth: Annotated[
        int | None, typer.Option(min=1, help="Maximum levels of a draft tree; turns pauses off.")
    ] = None
    engine: Engine = "auto"
    memory: Annotated[
        Path | None,
        typer.Option(help="File of the memory of look-ups, read and written; see speclm warm."),
    ] = None
    corpus: Corpus = None
    token_map: TokenMap = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingOptions(DraftOptions):
    """Options of every command that samples as the user chooses."""

    max_new_tokens: MaxNewTokens = 128
    temperature: Annotated[float, typer.Option(min=0.0, help="0 decodes greedily.")] = 0.0
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Top-p of sampling.")] = 1.0
    top_k: Annotated[
        int, typer.Option(min=0, max=MAX_INT, help="Top-k of sampling; 0 for no limit.")
    ] = 0
    seed: Seed = 0

    def arguments(self) -> dict[str, Any]:
        """Return what ``generate()`` takes."""
        arguments: dict[str, Any] = {"max_new_tokens": self.max_new_tokens}
        if self.temperature == 0.0:
            return {**arguments, "do_sample": False}
        sampling = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        return {**arguments, "do_sample": True, **sampling}


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateOptions(SamplingOptions):
    """Generate an answer; accepted draft tokens are coloured."""

    prompt: Annotated[str | None, typer.Option(help="Text of the prompt.")] = None
    file: Annotated[
        Path | None, typer.Option(help="File with the prompt; - for standard input.")
    ] = None
    chat: Annotated[bool, typer.Option(help="Apply the chat template.")] = True
    compare: Annotated[
        bool,
        typer.Option("--compare", help="Run regular generation too; exit code 1 if it differs."),
    ] = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatOptions(SamplingOptions):
    """Chat with a model; /help lists the commands. Piped input is answered line by line."""

    max_new_tokens: MaxNewTokens = 512
    system: Annotated[str | None, typer.Option(help="Text of a system message.")] = None
    show_accepted: Annotated[
        bool, typer.Option("--show-accepted", help="Colour accepted draft tokens.")
    ] = False


@dataclass(frozen=True, slots=True, kw_only=True)
class WebuiOptions(SamplingOptions):
    """Chat with a model on a web page, which shows where each token comes from.

    The options of sampling are what the page's settings are at first.
    """

    max_new_tokens: MaxNewTokens = 512
    system: Annotated[str | None, typer.Option(help="Text of a system message.")] = None
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")
    ] = "127.0.0.1"
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port to listen on; 0 for a free one.")
    ] = 7860


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions(DraftOptions):
    """Measure speculative and regular generation in pairs, and check that outputs are equal."""

    prompts: Annotated[
        str,
        typer.Option(
            help="spec-bench or mt-bench for bundled questions; a file of questions of Spec-Bench, "
            'MT-bench or HumanEval, or of JSON lines with "messages" or "prompt"; - for standard '
            "input."
        ),
    ]
    setting: Annotated[
        str, typer.Option(help="greedy, t0.7 or t1.0; several separated by commas.")
    ] = "greedy,t1.0"
    batch: Batch = "1"
    num_prompts: NumPrompts = None
    max_new_tokens: MaxNewTokens = 128
    prompt_lookup: Annotated[
        bool, typer.Option("--prompt-lookup", help="Measure Transformers' prompt lookup too.")
    ] = False
    no_pauses: Annotated[
        bool,
        typer.Option("--no-pauses", help="Draft in every round, so that tau is that of the heads."),
    ] = False
    seed: Seed = 0
    out: Annotated[Path | None, typer.Option(help="Append records to this file.")] = None
    make_folders: Annotated[
        bool, typer.Option("--make-folders", help="Make the folders of --out without asking.")
    ] = False
    report: Annotated[
        Path | None,
        typer.Option(help="Write figures, pages and charts into this folder; needs matplotlib."),
    ] = None
    answers: Annotated[
        Path | None, typer.Option(help="Write the answers into this folder, as Spec-Bench does.")
    ] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TuneOptions(HeadsOptions):
    """Measure which draft trees give the most tokens per second on this machine.

    Methods that rank their candidates also get a static tree, found on every other prompt and
    compared with the default on the rest; --save writes it.
    """

    prompts: Annotated[
        Path | None,
        typer.Option(
            help='JSON lines with "messages" or "prompt"; - for standard input; by default '
            "bundled prompts."
        ),
    ] = None
    setting: Annotated[str, typer.Option(help="greedy, t0.7 or t1.0.")] = "greedy"
    batch: Batch = "1"
    num_prompts: NumPrompts = 16
    max_new_tokens: Annotated[
        int, typer.Option(min=4, max=MAX_INT, help="Maximum new tokens of each answer.")
    ] = 96
    num_draft_tokens: Annotated[
        int | None, typer.Option(min=1, help="Size of the static tree; by default the fastest.")
    ] = None
    save: Annotated[
        Path | None,
        typer.Option(
            help="Write the static tree to this JSON file, for --tree and generate(); or into the "
            "folder of --heads, which is then loaded with it."
        ),
    ] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class WarmOptions(ModelOptions):
    """Fill a memory for drafting from your own prompts.

    The base answers each prompt greedily; chats that end with an answer are only read. The memory
    holds fragments of these texts.
    """

    prompts: Annotated[
        Path,
        typer.Option(help='JSON lines with "messages" or "prompt", - for standard input.'),
    ]
    out: Annotated[Path, typer.Option(help="Write the memory here, a file named *.safetensors.")]
    merge: Annotated[
        list[Path] | None,
        typer.Option(help="Add a memory of the same base, as an older one; repeatable."),
    ] = None
    max_pairs: Annotated[
        int, typer.Option(min=0, max=MAX_INT, help="Maximum pairs of tokens to remember.")
    ] = 100_000
    num_prompts: NumPrompts = None
    max_new_tokens: MaxNewTokens = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexOptions:
    """Write an index over texts, which drafts what followed the same tokens there.

    Of a conversation the assistant's turns are indexed, and of any other text all.
    """

    data: Annotated[
        Path, typer.Option(help='JSON lines with "messages" or "text", - for standard input.')
    ]
    out: Annotated[Path, typer.Option(help="File to write.")]
    base: Annotated[
        str | None, typer.Option(help="Folder or hub id; by default the bundled model.")
    ] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyOptions(ModelOptions):
    """Check heads in any format; or, without any, that a model decodes the same tokens with drafts.

    Of heads it prints their formats, sizes and what loads them, and compares them with a base and
    with the heads that they were converted from. Of a model it prints how drafts are verified, and
    compares outputs; drafts are the right tokens with some errors.
    """

    heads: Annotated[
        str | None, typer.Argument(help="Folder or hub id of heads, to check these.")
    ] = None
    source: Annotated[
        str | None,
        typer.Option(help="Heads that these were converted from, whose logits have to be equal."),
    ] = None
    heads_revision: HeadsRevision = None
    heads_subfolder: HeadsSubfolder = None
    token_map: TokenMap = None
    num_prompts: Annotated[int, typer.Option(min=1, help="Prompts of each setting.")] = 8
    max_new_tokens: MaxNewTokens = 32
    batch: Annotated[int, typer.Option(min=1, help="Rows of the larger calls.")] = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillOptions(SamplingOptions):
    """Generate the answers of conversations anew, with the base or a server.

    Heads learn to draft what the base writes. Finished rows are kept next to --out, and the same
    command goes on where an interrupted one ended.
    """

    data: Annotated[Path, typer.Option(help='JSON lines with "messages".')]
    out: Annotated[Path, typer.Option(help="File of JSON lines to write.")]
    max_new_tokens: MaxNewTokens = 512
    system: Annotated[
        str | None, typer.Option(help="System message of conversations without one.")
    ] = None
    keep_cut: Annotated[
        bool,
        typer.Option("--keep-cut", help="Keep answers cut at --max-new-tokens, marked as such."),
    ] = False
    batch_size: Annotated[
        int, typer.Option(min=1, help="Conversations that the base answers together.")
    ] = 8
    num_shards: Annotated[
        int, typer.Option(min=1, help="Processes that share the rows, each with its --shard.")
    ] = 1
    shard: Annotated[int, typer.Option(min=0, help="Number of this process, from 0.")] = 0
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Replace --out, and rows of other data or options."),
    ] = False
    server: Annotated[
        str | None,
        typer.Option(help="Ask an OpenAI-compatible server, such as http://localhost:8000/v1."),
    ] = None
    model: Annotated[str | None, typer.Option(help="The server's name of the model.")] = None
    api_key_env: Annotated[
        str | None, typer.Option(help="Environment variable with the server's key.")
    ] = None
    concurrency: Annotated[int, typer.Option(min=1, help="Requests to the server at a time.")] = 8
    timeout: Annotated[float, typer.Option(help="Seconds to wait for the server.")] = 600.0
    retries: Annotated[int, typer.Option(min=0, help="How often a request is sent again.")] = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoOptions:
    """Decode bundled text-to-SQL and maths prompts with and without drafts, and compare."""

    num_prompts: Annotated[int, typer.Option(min=1, help="Prompts of each set.")] = 5
    threads: Annotated[
        int, typer.Option(min=1, max=1024, help="Threads of PyTorch; one suits a small model.")
    ] = 1
    tuning_prompts: Annotated[
        bool, typer.Option("--tuning-prompts", help="Use the prompts for choosing settings.")
    ] = False


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelsOptions:
    """Show how tree attention is launched; with --tune, measure other sizes on this GPU.

    What --tune writes is used if the environment variable SPECLM_KERNEL_CONFIGS names it.
    """

    arch: Annotated[str | None, typer.Option(help="Another GPU, such as sm_80 or gfx942.")] = None
    tune: Annotated[
        Path | None, typer.Option(help="Measure sizes on this GPU and write them here.")
    ] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvOptions:
    """Print versions, machine, devices and methods, ready to paste into an issue."""
