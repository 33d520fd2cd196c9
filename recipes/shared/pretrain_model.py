"""The model of a Geneformer pretraining run, as its engine and its device would have it."""

import torch

from celltron.models.geneformer import Geneformer, build_geneformer
from celltron.models.layers.choice import LayerChoice, choose_layers
from celltron.models.layers.rows import check_compiler
from celltron.recipes.shared.pretrain_config import Config
from celltron.train.engine import transformer_settings
from celltron.train.precision import DTYPES


def pick_layers(config: Config, device: torch.device) -> LayerChoice:
    """Which layers the run gets.

    Raises:
        InputError: the device or what is installed on it cannot do what the engine is asked for.
    """
    if config.engine.compile:
        check_compiler(device)
    engine = config.engine
    return choose_layers(engine.layers, device=device, dtype=DTYPES[config.precision], float8=engine.fp8)


def build_model(config: Config, *, num_tokens: int) -> Geneformer:
    """This process's part of the model with its initial weights; Megatron's parallel state must be there."""
    choice = pick_layers(config, torch.device(torch.cuda.current_device()))
    return build_geneformer(
        config.model,
        num_tokens=num_tokens,
        dtype=DTYPES[config.precision],
        sequence_parallel=config.parallel.sequence_parallel,
        seed=config.loop.seed,
        layers=choice.layers,
        is_compiled=config.engine.compile,
        # PyTorch's FSDP has no sum of gradients to add to.
        gradient_accumulation_fusion=choice.fuses_gradients and not config.parallel.fsdp,
        **transformer_settings(config.engine),
    )
