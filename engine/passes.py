"""How a run launches its passes: as CUDA graphs or op by op, and whether a frozen tower's features are kept."""

from __future__ import annotations

import logging

import torch

from engine.config import Config
from engine.data.planning import most_tiles
from engine.distributed import Ranks
from engine.graphs import CudaRecorder, GraphedPasses, Passes
from engine.pictures import in_order
from engine.tower_cache import TowerCache, keeps_features
from models.vlm import VisionLanguageModel

logger = logging.getLogger("nibble")


def choose_passes(
    config: Config, model: VisionLanguageModel, device: torch.device, ranks: Ranks, num_samples: int
) -> Passes:
    """For a run over `num_samples` samples; says in the log what was chosen and why."""
    features = None
    itemsize = model.vision.patch_embed.weight.dtype.itemsize
    if keeps_features(model.vision, itemsize) and in_order(config, model.config):
        most_new = most_tiles(config.runtime.tokens_per_batch)
        features = TowerCache(model.vision, device, images=num_samples, most_new=most_new)
        logger.info("the vision tower is frozen: its features of %d images are kept", features.places.rows)
    why_not = graphs_obstacle(config, device, ranks)
    logger.info("CUDA graphs: %s", why_not or "one for each shape of packs, from its second pass on")
    return Passes(device, features) if why_not else GraphedPasses(device, CudaRecorder(device), features)


def graphs_obstacle(config: Config, device: torch.device, ranks: Ranks) -> str:
    """Why a run does without CUDA graphs; empty where it can have them."""
    if device.type != "cuda":
        return f"none on a {device.type.upper()}"
    if not config.runtime.cuda_graphs:
        return "none: --runtime.cuda_graphs False"
    if ranks.world > 1:
        return f"none with {ranks.world} ranks: DDP starts its exchange from the host, in the middle of a backward pass"
    if config.runtime.deterministic:
        return "none with --runtime.deterministic: a product may have other bits in a graph than outside"
    if config.debug:
        return "none with --debug: an error should name the launch it comes from"
    return ""
