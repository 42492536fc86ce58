"""The table of all settings of `generate`, and what becomes of each; the guide is written from it.

Transformers silently prefers a callable given as ``custom_generate`` to most of its own ways to
decode. So no setting may be missing: each field of `GenerationConfig`, each parameter of
`generate` and each model input of a text prompt has a row here.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Any

from transformers import GenerationConfig

Lookup = Callable[[str], Any]
"""Returns the value of a setting by its name, as Transformers resolves it."""


class Kind(Enum):
    """Where a setting may stand."""

    FIELD = "field"
    """A field of a generation config, given as a keyword or in a config."""
    PARAMETER = "parameter"
    """A parameter of `generate`."""
    INPUT = "model input"
    """An input of the model, given as a keyword."""


class Fate(Enum):
    """What becomes of a setting that has an effect."""

    HONOURED = "honoured"
    """The decode loop gives what ``base.generate`` gives; what that ignores is ignored too."""
    DELEGATED = "delegated"
    """``base.generate`` answers the call itself, and one line is logged."""
    REFUSED = "refused"
    """An `OptionError` is raised before anything is computed."""


FIELD, PARAMETER, INPUT = Kind
HONOURED, DELEGATED, REFUSED = Fate


@dataclass(frozen=True, slots=True)
class Setting:
    """One row of the table.

    Args:
        name: Name in Transformers.
        note: A verb phrase whose subject is the setting.
        kind: Where it may be given.
        fate: What becomes of it.
        inactive: Values at which it has no effect.
        needs: Name of the setting without which it has no effect.
        unless: Name of the setting with which it has no effect.
        default: Value where nobody sets one.
    """

    name: str
    note: str
    kind: Kind = FIELD
    fate: Fate = HONOURED
    inactive: tuple[Any, ...] = (None,)
    needs: str | None = None
    unless: str | None = None
    default: Any = None

    def is_active(self, lookup: Lookup) -> bool:
        """Return whether the setting has an effect in Transformers' own `generate`."""
        value = lookup(self.name)
        # A comparison of tensors has no truth value.
        if any(value is other or (_is_plain(value) and value == other) for other in self.inactive):
            return False
        if self.needs is not None and not BY_NAME[self.needs].is_active(lookup):
            return False
        return self.unless is None or not BY_NAME[self.unless].is_active(lookup)

    def describe(self, value: Any) -> str:
        """Return the setting with a value that can be read, or its name."""
        is_short = value is None or isinstance(value, bool | int | float | str)
        return f"{self.name}={value!r}" if is_short else self.name


def _is_plain(value: Any) -> bool:
    return isinstance(value, bool | int | float | str | list)


_OFF = (None, False)
_OWN = "asks for Transformers' own speculation, and this model has its own"
_OUTPUTS = "asks for tensors of one forward for each token, and a round has one for several"
_OF_BEAMS = "shapes beam search"
_OF_THE_ASSISTANT = "tunes assisted generation; Transformers has a default"
_OF_THE_CACHE = "describes a cache of a kind named by `cache_implementation`"

_delegated, _refused = partial(Setting, fate=DELEGATED), partial(Setting, fate=REFUSED)

SETTINGS: tuple[Setting, ...] = (
    # Prompt and model inputs.
    Setting("inputs", "is the prompt `[batch, seq]`", PARAMETER),
    Setting("input_ids", "is another name of `inputs`", INPUT),
    Setting(
        "attention_mask",
        "marks padding on the left; padding on the right is a `PromptError`, and a mask with holes "
        "is delegated",
        INPUT,
    ),
    Setting(
        "past_key_values",
        "continues from a `DynamicCache`; a cache that cannot be rolled back is a `CacheError`",
        INPUT,
    ),
    Setting("logits_to_keep", "has no effect on tokens", INPUT),
    _delegated("position_ids", "numbers the prompt by hand", INPUT),
    Setting("inputs_embeds", "is a prompt of vectors, of which proposers see no text", INPUT),
    _delegated("labels", "has the model compute a loss", INPUT),
    # Parameters of `generate`.
    Setting("generation_config", "holds any of the fields", PARAMETER),
    Setting("logits_processor", "changes scores; any class may be in the list", PARAMETER),
    Setting(
        "stopping_criteria",
        "ends rows; any class may be in the list",
        PARAMETER,
        inactive=(None, []),
    ),
    Setting("prefix_allowed_tokens_fn", "allows tokens by the text so far", PARAMETER),
    Setting("streamer", "receives tokens as they are committed", PARAMETER),
    Setting("tokenizer", "is read by `stop_strings` and `token_healing`", PARAMETER),
    Setting(
        "trust_remote_code",
        "is read by ways to decode that Transformers fetches from the hub, none of them ours",
        PARAMETER,
        inactive=_OFF,
    ),
    _delegated(
        "synced_gpus",
        "keeps the forwards of processes that share one model synchronised",
        PARAMETER,
        inactive=_OFF,
    ),
    _refused("custom_generate", "replaces the loop of this model's own speculation", PARAMETER),
    _refused("assistant_model", _OWN, PARAMETER),
    _refused(
        "assistant_tokenizer",
        "translates for an assistant model of another vocabulary",
        PARAMETER,
        needs="assistant_model",
    ),
    # Length and stopping.
    Setting("max_length", "bounds prompt and new tokens together"),
    Setting("max_new_tokens", "bounds the new tokens"),
    Setting("min_length", "keeps rows from ending before that length"),
    Setting("min_new_tokens", "keeps rows from ending before that many tokens"),
    Setting("max_time", "stops after that many seconds, at the end of a forward"),
    Setting("stop_strings", "ends a row at a text; needs `tokenizer`"),
    Setting("eos_token_id", "ends a row; one id or several"),
    Setting("pad_token_id", "fills rows that have ended"),
    Setting("bos_token_id", "is the prompt where none is given"),
    Setting("decoder_start_token_id", "has no effect without an encoder"),
    # Sampling.
    Setting("do_sample", "samples instead of taking the best", inactive=_OFF),
    Setting("num_return_sequences", "samples several continuations of each row"),
    Setting("temperature", "flattens or sharpens the distribution"),
    Setting("top_k", "keeps the k best tokens", inactive=(None, 0)),
    Setting("top_p", "keeps the best tokens up to a mass"),
    Setting("min_p", "keeps tokens above a share of the best one"),
    Setting("top_h", "keeps the best tokens up to a share of the entropy"),
    Setting("typical_p", "keeps tokens of typical information"),
    Setting("epsilon_cutoff", "drops tokens below a probability"),
    Setting("eta_cutoff", "drops tokens below a bound that entropy sets"),
    # Scores.
    Setting("repetition_penalty", "makes tokens of the text so far less likely"),
    Setting("encoder_repetition_penalty", "makes tokens of the prompt more likely"),
    Setting("no_repeat_ngram_size", "forbids to repeat n-grams of the text"),
    Setting("encoder_no_repeat_ngram_size", "forbids n-grams of the prompt"),
    Setting("bad_words_ids", "forbids sequences of tokens"),
    Setting("sequence_bias", "makes sequences of tokens more or less likely"),
    Setting("suppress_tokens", "forbids tokens"),
    Setting("begin_suppress_tokens", "forbids tokens at the first new position"),
    Setting("forced_bos_token_id", "sets the token after a prompt of one token"),
    Setting("forced_eos_token_id", "sets the token at `max_length`"),
    Setting("exponential_decay_length_penalty", "makes ending more likely from some position on"),
    Setting("remove_invalid_values", "replaces scores that are not finite"),
    Setting("renormalize_logits", "normalises the processed scores"),
    Setting("watermarking_config", "marks the text by a bias that a key sets"),
    # Outputs.
    Setting(
        "return_dict_in_generate",
        "returns a `SpeculativeOutput`, which has the counters too",
        inactive=_OFF,
    ),
    Setting("output_scores", "returns the processed scores", inactive=_OFF),
    Setting("output_logits", "returns the logits", inactive=_OFF),
    _refused("output_attentions", _OUTPUTS, inactive=_OFF, needs="return_dict_in_generate"),
    _refused("output_hidden_states", _OUTPUTS, inactive=_OFF, needs="return_dict_in_generate"),
    # Cache and prefill.
    _delegated(
        "use_cache",
        "recomputes the text for each token where it is not True",
        inactive=(True,),
        default=True,
    ),
    # "hybrid" is what old configs say; Transformers takes it for unset.
    _delegated(
        "cache_implementation",
        'names a cache that trees cannot use; `"dynamic"` is the usual one and has no effect',
        inactive=(None, "dynamic", "hybrid"),
    ),
    _delegated("cache_config", _OF_THE_CACHE, needs="cache_implementation"),
    _delegated("max_cache_len", _OF_THE_CACHE, needs="cache_implementation"),
    _delegated(
        "compile_config", "compiles forwards with a static cache", needs="cache_implementation"
    ),
    _delegated(
        "disable_compile",
        "keeps forwards with a static cache from being compiled",
        inactive=_OFF,
        needs="cache_implementation",
    ),
    _delegated(
        "continuous_batching_config",
        'describes batching under `cache_implementation="paged"`',
        needs="cache_implementation",
    ),
    _delegated("prefill_chunk_size", "reads the prompt in pieces"),
    # Other ways to decode.
    _delegated("num_beams", "searches with beams", inactive=(None, 1), default=1),
    _delegated("num_beam_groups", _OF_BEAMS, needs="num_beams"),
    _delegated("diversity_penalty", _OF_BEAMS, needs="num_beams"),
    _delegated("length_penalty", _OF_BEAMS, needs="num_beams"),
    _delegated("early_stopping", _OF_BEAMS, inactive=_OFF, needs="num_beams"),
    _delegated("low_memory", _OF_BEAMS, inactive=_OFF, needs="num_beams"),
    _delegated("constraints", "searches with beams for texts that have to occur"),
    _delegated("force_words_ids", "searches with beams for words that have to occur"),
    _delegated("penalty_alpha", "searches contrastively", inactive=(None, 0), unless="do_sample"),
    _delegated("dola_layers", "contrasts layers"),
    _delegated(
        "guidance_scale",
        "runs a second forward for each token, without the prompt",
        inactive=(None, 1),
    ),
    _delegated(
        "negative_prompt_ids",
        "is the prompt of that second forward",
        PARAMETER,
        needs="guidance_scale",
    ),
    _delegated(
        "negative_prompt_attention_mask", "marks padding in it", PARAMETER, needs="guidance_scale"
    ),
    _delegated(
        "token_healing", "rewrites the end of the prompt before anything is decoded", inactive=_OFF
    ),
    # Transformers' own speculation.
    _refused("prompt_lookup_num_tokens", _OWN),
    _refused("assistant_early_exit", _OWN),
    _refused("use_mtp", _OWN, inactive=_OFF),
    _refused("speculation_type", _OWN),
    _refused("is_assistant", "makes a model draft for another", inactive=_OFF),
    _refused("max_matching_ngram_size", "tunes prompt lookup", needs="prompt_lookup_num_tokens"),
    _refused("num_assistant_tokens", _OF_THE_ASSISTANT, needs="assistant_model"),
    _refused("num_assistant_tokens_schedule", _OF_THE_ASSISTANT, needs="assistant_model"),
    _refused("assistant_confidence_threshold", _OF_THE_ASSISTANT, needs="assistant_model"),
    _refused("assistant_lookbehind", _OF_THE_ASSISTANT, needs="assistant_model"),
    _refused("target_lookbehind", _OF_THE_ASSISTANT, needs="assistant_model"),
    _refused(
        "assistant_ensemble_weight",
        "mixes the distribution of an assistant model into the result",
        needs="assistant_model",
    ),
    # Bookkeeping.
    Setting("transformers_version", "says who wrote a config; has no effect"),
)
"""All rows. Where several fit a call, the first one is named."""

BY_NAME: Mapping[str, Setting] = {setting.name: setting for setting in SETTINGS}

REFUSED_SETTINGS = tuple(setting for setting in SETTINGS if setting.fate is REFUSED)
LEFT_TO_THE_BASE = tuple(setting for setting in SETTINGS if setting.fate is DELEGATED)


def first_active(settings: Iterable[Setting], lookup: Lookup) -> Setting | None:
    """Return the first setting that has an effect, None without one."""
    return next((setting for setting in settings if setting.is_active(lookup)), None)


def resolve_setting(name: str, arguments: Mapping[str, Any], default: GenerationConfig) -> Any:
    """Return a setting as `generate` resolves it.

    A keyword counts even if it is None. Then come the config that was given and the model's own,
    which have no effect on what only `generate` or the model takes.
    """
    if name in arguments:
        return arguments[name]
    setting = BY_NAME.get(name)
    if setting is not None and setting.kind is not Kind.FIELD:
        return None
    for config in (arguments.get("generation_config"), default):
        value = getattr(config, name, None)
        if value is not None:
            return value
    return None if setting is None else setting.default
