"""Trains heads on a frozen base. Not imported by ``import speclm``."""

from speclm.training.arguments import parse_settings, training_arguments
from speclm.training.conversations import Conversation, read_conversations
from speclm.training.medusa_model import MedusaObjective
from speclm.training.medusa_trainer import MedusaTrainer, new_medusa_heads
from speclm.training.rows import TrainingRows, collate_rows, load_rows

__all__ = [
    "Conversation",
    "MedusaObjective",
    "MedusaTrainer",
    "TrainingRows",
    "collate_rows",
    "load_rows",
    "new_medusa_heads",
    "parse_settings",
    "read_conversations",
    "training_arguments",
]
