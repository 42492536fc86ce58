"""An adapter with which a base is tuned, and what is written of the tuned base."""

import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager
from copy import deepcopy
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from speclm.cards import GENERATED_MARK
from speclm.config import require_positive, require_size
from speclm.drafting.heads_folder import CARD_NAME, CONFIG_NAME
from speclm.errors import CheckpointError, OptionError, UnsupportedModelError
from speclm.files.atomic import write_file, written_together

FOLDERS: Mapping[str, str] = {"adapter": "adapter", "merged": "base"}
"""Names of the folders of the adapter, and of the base that is merged with it."""

_CONFIGS = {"adapter": "adapter_config.json", "merged": CONFIG_NAME}
_TITLES = {"adapter": "Adapter of the base", "merged": "Tuned base"}
_DROPOUT = 0.05  # Source: Cai et al. 2024
_CARD = """\
{mark}

# {title}

Trained together with the heads in the folder above{for_base}. With these heads, the output is that
of the tuned base, and not that of the base before the training.
"""


class Adapter:
    """A LoRA on all linear layers of a base but its head; it sits in the base itself."""

    def __init__(
        self, base: PreTrainedModel, *, rank: int = 32, alpha: float = 16.0, seed: int = 0
    ) -> None:
        """Put an untrained adapter into a base, which says the same as before, and freeze the rest.

        Args:
            base: The target; changed in place.
            rank: Rank of the adapter's matrices.
            alpha: Their factor, multiplied by the rank.
            seed: Seed of half of them; the others are zero.

        Raises:
            OptionError: If peft is not installed, or a value is out of range.
            UnsupportedModelError: If the base has an adapter already, or lies on several devices.
        """
        require_size("rank", rank)
        require_positive("alpha", alpha)
        try:
            import peft
        except ImportError as error:
            raise OptionError(
                f"tuning the base needs peft, which is not installed ({error}); install the extra "
                "'train'"
            ) from error
        name, tuned = base.config.name_or_path, peft.tuners.tuners_utils.BaseTunerLayer
        if any(isinstance(module, tuned) for module in base.modules()):
            raise UnsupportedModelError(
                f"base {name} has an adapter in its layers, expected one without; merge it first "
                "with merge_and_unload()"
            )
        devices = {str(device) for device in (getattr(base, "hf_device_map", None) or {}).values()}
        if len(devices) > 1:
            raise UnsupportedModelError(
                f"base {name} lies on the devices {sorted(devices)!r}, expected one device for a "
                "base that is tuned; load it without a device map"
            )
        config = peft.LoraConfig(
            r=rank,
            lora_alpha=cast("Any", alpha),  # whole numbers are usual, and others work
            lora_dropout=_DROPOUT,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            # peft asks Transformers for an attribute by the name that it had before.
            warnings.filterwarnings("ignore", ".is_gradient_checkpointing.", FutureWarning)
            torch.manual_seed(seed)
            self._model: Any = peft.get_peft_model(base, config)
        base.train(mode=base.training)  # the new modules too
        self.parameters: dict[str, nn.Parameter] = {
            name: parameter
            for name, parameter in base.named_parameters()
            if parameter.requires_grad
        }
        """The adapter's own parameters, by their names in the base."""
        self.dropouts = [
            module
            for name, module in base.named_modules()
            if ".lora_dropout." in name and isinstance(module, nn.Dropout)
        ]

    def off(self) -> AbstractContextManager[None]:
        """Return a context in which the base is what it was without the adapter."""
        context: AbstractContextManager[None] = self._model.disable_adapter()
        return context

    def merged(self) -> PreTrainedModel:
        """Return a copy of the base with the adapter added to its weights."""
        merged: PreTrainedModel = deepcopy(self._model).merge_and_unload()
        return merged

    def write(
        self,
        folder: Path,
        output: str,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        base_id: str | None = None,
    ) -> None:
        """Write the adapter or the merged base, whose files appear together.

        Args:
            folder: Folder of the heads, in which it gets a folder of its own.
            output: A key of `FOLDERS`.
            tokenizer: The base's, written too; None for none.
            base_id: Name of the base for the card, if others can find it by that name.

        Raises:
            CheckpointError: If there is another model.
        """
        part = require_part(folder, output)
        with written_together(part, last=_CONFIGS[output]) as aside:
            if output == "merged":
                self.merged().save_pretrained(aside)
            else:  # the check of embeddings would look the base up on the hub
                self._model.save_pretrained(aside, save_embedding_layers=False)
            if tokenizer is not None:
                tokenizer.save_pretrained(aside, save_jinja_files=False)
            for_base = f", from {base_id}" if base_id else ""
            card = _CARD.format(mark=GENERATED_MARK, title=_TITLES[output], for_base=for_base)
            write_file(aside / CARD_NAME, card)


def require_output(base: PreTrainedModel, output: str) -> None:
    """Check that what is asked for can be written of a base.

    Raises:
        OptionError: If it is unknown, or a quantised base is to be merged.
    """
    if output not in FOLDERS:
        raise OptionError(f"output is {output!r}, expected one of {[*FOLDERS]!r}; choose one")
    if output == "merged" and getattr(base, "is_quantized", False):
        raise OptionError(
            f"output is 'merged' and base {base.config.name_or_path} is quantised, expected one in "
            "floating point, to whose weights the adapter can be added; write the adapter"
        )


def require_part(folder: Path, output: str) -> Path:
    """Return where something is written of the base, and check that it destroys nothing.

    Raises:
        CheckpointError: If there is a file or another model.
    """
    part = folder / FOLDERS[output]
    card = part / CARD_NAME
    is_mine = card.is_file() and GENERATED_MARK in card.read_text("utf-8", errors="replace")
    if part.exists() and not (part.is_dir() and (is_mine or not any(part.iterdir()))):
        raise CheckpointError(
            f"{part}: found other files, expected none or those of an earlier training; choose "
            "another folder for the heads"
        )
    return part
