"""Trains heads on a frozen base. Not imported by ``import speclm``."""

from speclm.training.arguments import (
    DEFAULTS,
    EAGLE_DEFAULTS,
    parse_settings,
    training_arguments,
)
from speclm.training.conversations import Conversation, read_conversations
from speclm.training.draft_vocabulary import choose_columns, count_tokens
from speclm.training.eagle_model import EagleObjective
from speclm.training.eagle_trainer import EagleTrainer, load_eagle_heads, new_eagle_heads
from speclm.training.heads_trainer import HeadsTrainer
from speclm.training.medusa_model import MedusaObjective
from speclm.training.medusa_trainer import MedusaTrainer, new_medusa_heads
from speclm.training.rows import TrainingRows, collate_rows, load_rows

__all__ = [
    "DEFAULTS",
    "EAGLE_DEFAULTS",
    "Conversation",
    "EagleObjective",
    "EagleTrainer",
    "HeadsTrainer",
    "MedusaObjective",
    "MedusaTrainer",
    "TrainingRows",
    "choose_columns",
    "collate_rows",
    "count_tokens",
    "load_eagle_heads",
    "load_rows",
    "new_eagle_heads",
    "new_medusa_heads",
    "parse_settings",
    "read_conversations",
    "training_arguments",
]
