"""Heads of every method on one base, and a folder with its hidden states."""

import torch

from speclm.methods.block.objective import BlockObjective, BlockTrainingModel
from speclm.methods.block.training import new_block_heads
from speclm.methods.eagle.objective import EagleTrainingModel
from speclm.methods.eagle.training import new_eagle_heads
from speclm.methods.medusa.training import MedusaTrainingModel, new_medusa_heads
from speclm.training.arguments import training_arguments
from speclm.training.dataset import ExampleDataset
from speclm.training.feature_cache import FeatureCache
from speclm.training.feature_writer import plan_features
from speclm.training.heads_trainer import HeadsTrainer
from tests.models import build_model
from tests.training.runs import SETTINGS

METHODS = ("medusa", "eagle", "eagle3", "block")
VOCAB = 24
NEAR = 2e-4  # float32, seven layers, and products of other shapes
SHARD_BYTES = 1000  # several files


def deep_base(**settings):
    """Return a model with enough layers for the features of all heads."""
    return build_model("llama", num_hidden_layers=7, vocab_size=VOCAB, hidden_size=16, **settings)


def random_texts(count=9, *, seed=3):
    """Return texts of different lengths, the last of which is the same as the first."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for row in range(count - 1):
        length = 6 + row % 5
        tokens = torch.randint(0, VOCAB, (length,), generator=generator).tolist()
        rows.append({"input_ids": tokens, "loss_mask": [0] * 2 + [1] * (length - 2)})
    return ExampleDataset([*rows, rows[0]])


def training_model(method, base):
    """Return new heads of a method on a base."""
    if method == "medusa":
        return MedusaTrainingModel(base, new_medusa_heads(base, num_heads=2))
    if method == "block":
        heads = new_block_heads(base, kind="dspark", block_size=3)
        objective = BlockObjective.usual("dspark", num_drafts=heads.config.num_drafts)
        return BlockTrainingModel(base, heads, objective=objective)
    return EagleTrainingModel(base, new_eagle_heads(base, kind=method))


def trainer_of(model, folder, data, **settings):
    """Return a trainer that evaluates on other texts at the end."""
    return HeadsTrainer(
        model,
        training_arguments(
            folder, {**SETTINGS, "max_steps": 4, "eval_strategy": "epoch"} | settings
        ),
        train_dataset=data,
        eval_dataset=random_texts(4, seed=8),
    )


def written(model, datasets, folder):
    """Write the features of some datasets, and open them."""
    plan = plan_features(model, datasets, folder, shard_bytes=SHARD_BYTES)
    plan.prepare()
    plan.write(model, batch_size=4)
    return FeatureCache(folder)
