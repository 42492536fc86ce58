"""Settings of `generate` in which the same tokens are promised, built anew for every call.

Processors and criteria hold state, so that a setting is a function; what it is given are the
prompts of the call.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import Tensor
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
    SynthIDTextWatermarkingConfig,
    WatermarkingConfig,
)

from speclm.demo.bundle import assets
from tests import callbacks
from tests.models import build_model

Inputs = dict[str, Tensor]
Arguments = dict[str, Any]

TINY_VOCAB_SIZE = 64
NEW_TOKENS = 14
EOS = [5, 19, 33, 47]  # about one token in sixteen: rows end early, late and at the maximal length
GREEDY: Arguments = {"do_sample": False}
SAMPLED: Arguments = {"do_sample": True, "top_k": 0}
NOT_FEW = list(range(8, TINY_VOCAB_SIZE))  # what is left repeats itself soon
TEXT = "SELECT name FROM 城市 WHERE 🙂 = 'naïve' AND 🇩🇪;"

_TINY = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "head_dim": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@dataclass(frozen=True)
class Setting:
    """One column of the matrix.

    Args:
        build: Arguments of a call, anew for the prompts given.
        model: Name of the model, see `tiny_model`.
        is_one_token: Whether prompts have one token, which some settings need to do anything.
    """

    build: Callable[[Inputs], Arguments]
    model: str = "ends"
    is_one_token: bool = False


@cache
def tiny_model(name: str) -> PreTrainedModel:
    """Return a model of two layers: one that ends its rows, an endless one, or one for text."""
    if name == "ends":
        return build_model("llama", vocab_size=TINY_VOCAB_SIZE, eos_token_id=EOS, **_TINY)
    if name == "endless":
        return build_model("llama", vocab_size=TINY_VOCAB_SIZE, **_TINY)
    eos = {"text": 1, "text without eos": None}[name]
    return build_model("llama", vocab_size=len(tokenizer()), eos_token_id=eos, **_TINY)


@cache
def tiny_draft(vocab_size: int) -> PreTrainedModel:
    """Return a model of that vocabulary which knows nothing of the others."""
    return build_model("llama", seed=7, vocab_size=vocab_size, **_TINY)


@cache
def tokenizer() -> PreTrainedTokenizerBase:
    """Return the byte-level tokenizer of the bundled base."""
    return AutoTokenizer.from_pretrained(assets()["base"])


def force_text(text: str, inputs: Inputs) -> Callable[[int, Tensor], list[int]]:
    """Return a function that allows each row a text alone: row i from its token i on."""
    tokens = tokenizer().encode(text)
    start = inputs["input_ids"].shape[1]

    def allowed(row: int, so_far: Tensor) -> list[int]:
        step = len(so_far) - start + row
        return [tokens[step]] if step < len(tokens) else [7 + row, 70 + step]

    return allowed


def _always(*parts: Arguments, model: str = "ends", **arguments: Any) -> Setting:
    merged: Arguments = {}
    for part in parts:
        merged |= part
    merged |= arguments
    return Setting(lambda _: dict(merged), model=model)


def _processors(
    common: Arguments, *builds: Callable[[int], Any], model: str = "ends", **arguments: Any
) -> Setting:
    def build(inputs: Inputs) -> Arguments:
        batch = len(inputs["input_ids"])
        processors = LogitsProcessorList([build(batch) for build in builds])
        return {**common, **arguments, "logits_processor": processors}

    return Setting(build, model=model)


def _criteria(
    common: Arguments, *builds: Callable[[int], Any], model: str = "ends", **arguments: Any
) -> Setting:
    def build(inputs: Inputs) -> Arguments:
        length = inputs["input_ids"].shape[1]
        criteria = StoppingCriteriaList([build(length) for build in builds])
        return {**common, **arguments, "stopping_criteria": criteria}

    return Setting(build, model=model)


def _stops_at(*strings: str, common: Arguments, model: str = "text") -> Setting:
    def build(inputs: Inputs) -> Arguments:
        return {
            **common,
            "stop_strings": list(strings),
            "tokenizer": tokenizer(),
            "prefix_allowed_tokens_fn": force_text(TEXT, inputs),
            "max_new_tokens": 30,
        }

    return Setting(build, model=model)


def _halved(row: int, so_far: Tensor) -> list[int]:
    """Allow few tokens, by the row and its text."""
    last = int(so_far[-1])
    return [last // 2, (last + row) % TINY_VOCAB_SIZE, 5, 40]


SETTINGS: dict[str, Setting] = {
    "greedy": _always(GREEDY),
    "default": _always(do_sample=True),
    "temperature 1": _always(SAMPLED, temperature=1.0),
    "temperature and top-p": _always(SAMPLED, temperature=0.7, top_p=0.9),
    "top-k": _always(do_sample=True, top_k=7, temperature=1.3),
    "min-p": _always(SAMPLED, min_p=0.05),
    "typical-p": _always(SAMPLED, typical_p=0.8),
    "epsilon cutoff": _always(SAMPLED, epsilon_cutoff=0.02),
    "eta cutoff": _always(SAMPLED, eta_cutoff=0.02),
    "top-h": _always(SAMPLED, top_h=0.5),
    "renormalised": _always(SAMPLED, top_p=0.8, renormalize_logits=True),
    "invalid values removed": _always(SAMPLED, remove_invalid_values=True),
    "suppressed tokens": _always(SAMPLED, suppress_tokens=[3, 4, 5, 60]),
    "warpers at once": _always(
        do_sample=True,
        temperature=0.8,
        top_k=40,
        top_p=0.95,
        min_p=0.01,
        suppress_tokens=[3, 4],
        renormalize_logits=True,
        remove_invalid_values=True,
    ),
    "repetition penalty, greedy": _always(GREEDY, repetition_penalty=1.4),
    "repetition penalty, sampled": _always(SAMPLED, repetition_penalty=1.2, temperature=0.8),
    "no repeated token, greedy": _always(GREEDY, no_repeat_ngram_size=1),
    "no repeated bigram, sampled": _always(
        SAMPLED, no_repeat_ngram_size=2, suppress_tokens=NOT_FEW
    ),
    "penalty on the prompt's tokens": _always(SAMPLED, encoder_repetition_penalty=6.0),
    "no n-gram of the prompt": _always(GREEDY, encoder_no_repeat_ngram_size=1),
    "bad word of one token": _always(SAMPLED, bad_words_ids=[[token] for token in range(1, 60, 2)]),
    "bad words of one and two tokens": _always(
        SAMPLED,
        bad_words_ids=[[3], [2, 4], [4, 6], [6, 2], [1, 1], [7, 1]],
        suppress_tokens=NOT_FEW,
    ),
    "bias on one token": _always(SAMPLED, sequence_bias=[[[7], 6.0], [[9], -5.0]]),
    "bias on two tokens": _always(GREEDY, sequence_bias=[[[7], 5.0], [[7, 9], 30.0]]),
    "min length": _always(SAMPLED, min_length=13),
    "min new tokens, greedy": _always(GREEDY, min_new_tokens=9),
    "min new tokens, sampled": _always(SAMPLED, min_new_tokens=6),
    "forced first token": Setting(
        lambda _: {**GREEDY, "forced_bos_token_id": 9, "begin_suppress_tokens": [9, 8]},
        is_one_token=True,
    ),
    "forced last token": _always(GREEDY, forced_eos_token_id=5, max_new_tokens=9),
    "forced last token of several": _always(SAMPLED, forced_eos_token_id=[5, 19]),
    "suppressed first tokens": _always(SAMPLED, begin_suppress_tokens=list(range(0, 60, 2))),
    "decay of the length": _always(SAMPLED, exponential_decay_length_penalty=(3, 1.3)),
    "allowed tokens, greedy": _always(GREEDY, prefix_allowed_tokens_fn=_halved),
    "allowed tokens, sampled": _always(SAMPLED, prefix_allowed_tokens_fn=_halved),
    "watermark, greedy": _always(GREEDY, watermarking_config=WatermarkingConfig(bias=4.0)),
    "watermark, sampled": _always(SAMPLED, watermarking_config=WatermarkingConfig(bias=2.0)),
    "watermark by a hash of itself": _always(
        SAMPLED,
        watermarking_config=WatermarkingConfig(
            bias=3.0, seeding_scheme="selfhash", context_width=2
        ),
    ),
    "SynthID watermark": _always(
        SAMPLED,
        watermarking_config=SynthIDTextWatermarkingConfig(
            keys=[3, 14, 15, 92], ngram_len=3, context_history_size=6
        ),
    ),
    "many processors at once": _always(
        SAMPLED,
        repetition_penalty=1.1,
        no_repeat_ngram_size=2,
        bad_words_ids=[[7], [10, 40]],
        min_new_tokens=3,
        exponential_decay_length_penalty=(2, 1.2),
        top_p=0.9,
        renormalize_logits=True,
    ),
    "one eos": _always(SAMPLED, eos_token_id=19),
    "eos given with the call": _always(GREEDY, eos_token_id=[2, 11, 23, 30, 44, 52, 61]),
    "eos of the config given": _always(
        generation_config=GenerationConfig(do_sample=True, eos_token_id=[1, 28, 51])
    ),
    "no eos, greedy": _always(GREEDY, model="endless"),
    "no eos, sampled": _always(SAMPLED, model="endless"),
    "one new token": _always(SAMPLED, max_new_tokens=1),
    "two new tokens": _always(SAMPLED, max_new_tokens=2),
    "three new tokens": _always(GREEDY, max_new_tokens=3),
    "max length": _always(SAMPLED, max_new_tokens=None, max_length=17),
    "max length without eos": _always(GREEDY, max_new_tokens=None, max_length=19, model="endless"),
    "several sequences": _always(SAMPLED, num_return_sequences=2),
    "stop string, greedy": _stops_at("WHERE", common=GREEDY),
    "stop string, sampled": _stops_at(" FROM", "xyz", common=SAMPLED),
    "stop strings inside tokens": _stops_at("ROM", "HER", "aïv", common=GREEDY),
    "stop string of several bytes": _stops_at("市", common=SAMPLED),
    "stop string across an emoji": _stops_at("🙂 = 'n", common=GREEDY),
    "stop string without eos": _stops_at("E 🙂", common=SAMPLED, model="text without eos"),
    "criterion by row": _criteria(GREEDY, lambda _: callbacks.EndsRows()),
    "criterion by row, sampled": _criteria(SAMPLED, lambda _: callbacks.EndsRows()),
    "criterion by row without eos": _criteria(
        GREEDY, lambda _: callbacks.EndsRows(), model="endless"
    ),
    "criterion by row without eos, sampled": _criteria(
        SAMPLED, lambda _: callbacks.EndsRows(), model="endless"
    ),
    "criterion by calls": _criteria(SAMPLED, lambda _: callbacks.EndsRowsByCalls()),
    "criterion by calls without eos": _criteria(
        SAMPLED, lambda _: callbacks.EndsRowsByCalls(), model="endless"
    ),
    "flag for all": _criteria(GREEDY, lambda length: callbacks.EndsAll(length=length + 6)),
    "flag for all without eos": _criteria(
        SAMPLED, lambda length: callbacks.EndsAll(length=length + 9), model="endless"
    ),
    "several criteria": _criteria(
        SAMPLED,
        lambda _: callbacks.EndsRows(modulus=11),
        lambda length: callbacks.EndsAll(length=length + 12),
        lambda _: callbacks.EndsRowsByCalls(first=5, step=4),
    ),
    "criterion on scores": _criteria(
        SAMPLED,
        lambda _: callbacks.ReadsScores(),
        output_scores=True,
        return_dict_in_generate=True,
    ),
    "processor counting calls": _processors(GREEDY, lambda _: callbacks.CountsCalls()),
    "processor counting calls, sampled": _processors(SAMPLED, lambda _: callbacks.CountsCalls()),
    "processor treating rows apart": _processors(GREEDY, callbacks.TreatsRowsApart),
    "processor treating rows apart, sampled": _processors(
        SAMPLED, callbacks.TreatsRowsApart, top_p=0.9
    ),
    "processor reading the whole batch": _processors(
        SAMPLED, lambda _: callbacks.ReadsTheWholeBatch()
    ),
    "processor reading the whole batch without eos": _processors(
        GREEDY, lambda _: callbacks.ReadsTheWholeBatch(), model="endless"
    ),
    "processor drawing at each call": _processors(SAMPLED, lambda _: callbacks.DrawsAtEachCall()),
    "processor drawing at each call, greedy": _processors(
        GREEDY, lambda _: callbacks.DrawsAtEachCall()
    ),
    "processor drawing at some calls": _processors(SAMPLED, lambda _: callbacks.DrawsAtSomeCalls()),
    "subclass of a built-in": _processors(SAMPLED, lambda _: callbacks.TopKByTheText()),
    "two processors of users": _processors(
        SAMPLED, lambda _: callbacks.CountsCalls(), callbacks.TreatsRowsApart, temperature=0.6
    ),
    "scores, greedy": _always(GREEDY, output_scores=True, return_dict_in_generate=True),
    "scores, sampled": _always(
        SAMPLED, output_scores=True, return_dict_in_generate=True, top_p=0.8
    ),
    "logits, sampled": _always(
        SAMPLED, output_logits=True, return_dict_in_generate=True, temperature=0.7
    ),
    "scores and logits with a penalty": _always(
        SAMPLED,
        output_scores=True,
        output_logits=True,
        return_dict_in_generate=True,
        repetition_penalty=3.0,
    ),
}
