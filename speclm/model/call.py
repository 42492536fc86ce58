"""One call of `generate`: what Transformers' entry for own decoding methods would lose."""

import copy
from typing import Any

from transformers import GenerationConfig
from transformers.generation.stopping_criteria import StoppingCriteriaList, StopStringCriteria

from speclm.model.arguments import resolve_setting


def for_own_loop(arguments: dict[str, Any], default: GenerationConfig) -> dict[str, Any]:
    """Return the arguments with which ``base.generate`` enters the decode loop.

    Transformers hands neither streamer nor tokenizer to a decoding method that is passed in, and
    builds the criterion for stop strings without the tokenizer that it needs. So the streamer is
    left out, for the loop to be given by itself, and stop strings become a criterion here.

    Args:
        arguments: Of `generate`.
        default: The model's own generation config.
    """
    arguments = {name: value for name, value in arguments.items() if name != "streamer"}
    stop_strings = resolve_setting("stop_strings", arguments, default)
    tokenizer = arguments.pop("tokenizer", None)
    if stop_strings is None:
        return arguments
    if tokenizer is None:
        return arguments  # Transformers says what is missing
    criteria = list(arguments.get("stopping_criteria") or [])
    if not any(type(criterion) is StopStringCriteria for criterion in criteria):
        criteria.insert(0, StopStringCriteria(tokenizer=tokenizer, stop_strings=stop_strings))
    arguments["stopping_criteria"] = StoppingCriteriaList(criteria)
    config = arguments.get("generation_config")
    if config is not None:
        arguments["generation_config"] = config = copy.deepcopy(config)
        config.stop_strings = None
    if config is None or default.stop_strings is not None:
        arguments["stop_strings"] = None  # outranks every config
    else:
        arguments.pop("stop_strings", None)
    return arguments
