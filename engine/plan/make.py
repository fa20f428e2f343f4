"""What a run needs, counted from shapes alone: parameters, memory by part, disk. No GPU, no weights, seconds.

Memory is predicted, not measured. Activations are those that the backward pass reads again (16-bit elements on a GPU):

    a layer of the language model   residual stream before each norm 2 D, q, k, v, o 4 D, gate and up 2 F   a token
    a block of the tower            the same with 6 W, and the MLP's input and output of its activation 2 F  a token
    with gradient checkpointing     the layer's input, plus one layer's working set
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

import torch

from engine.build import BITS, base_paths, vlm_config
from engine.config import Config
from engine.errors import UsageError
from engine.memory_size import gib
from engine.unpacked_memory import share_of
from kernels.linear_cross_entropy import MEMORY_BUDGET, chunk_rows
from models.language.llama import LLAMA_7B, LLAMA_13B
from models.vision.clip import ClipConfig
from models.vlm import VisionLanguageModel, VLMConfig
from models.weights.clip import open_vision
from models.weights.language import open_language

PUBLISHED = {"7B": LLAMA_7B, "13B": LLAMA_13B, "vicuna_7B": LLAMA_7B, "vicuna_13B": LLAMA_13B}
CARDS_GIB = {"24 GB": 24, "40 GB": 40, "80 GB": 80}
CONTEXT_BYTES = 512 * 2**20  # CUDA context and library workspaces, outside of the allocator
IMAGE_SHARE = 0.5  # of samples, on ScienceQA


@dataclass(frozen=True, slots=True)
class Plan:
    """A run's needs. Bytes are predictions."""

    model: str
    bits: str
    parameters: dict[str, int]  # by part
    trainable_parameters: int
    memory_bytes: dict[str, int]  # by part, with the sum as "total"
    samples_per_step: int
    tokens_per_pack: int
    peak_lr: float
    checkpoint_bytes: int
    fits: dict[str, bool]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2)


def stored_bytes(out_features: int, in_features: int, bits: int, dense_bytes: int) -> int:
    """Bytes of one frozen [out, in] weight: NF4 with double quantisation, row-wise int8, or dense."""
    n = out_features * in_features
    if bits == 4:
        blocks = -(-n // 64)
        return -(-n // 2) + blocks + 4 * -(-blocks // 256) + 4
    if bits == 8:
        return n + 4 * out_features
    return n * dense_bytes


def make_plan(
    config: Config, model_config: VLMConfig, name: str, *, num_ranks: int, dense_bytes: int = 2, on_cuda: bool = True
) -> Plan:
    """Counts a run. `dense_bytes` is the width of activations and 16-bit weights: 2 on a GPU, 4 on a CPU."""
    with torch.device("meta"):
        model = VisionLanguageModel(model_config)
    parts = {"language": 0, "vision": 0, "projector": 0, "adapters": 0, "modality_embedding": 0}
    for tensor_name, p in model.named_parameters():
        parts["adapters" if "_adapter." in tensor_name else tensor_name.split(".", 1)[0]] += p.numel()
    trainable = sum(p.numel() for p in model.trainable().values())
    memory = _weights(config, model, dense_bytes, on_cuda)
    memory["adapters and other trained weights"] = 4 * trainable
    memory["gradients"] = 4 * trainable * min(num_ranks, 2)  # DDP's buckets hold a copy
    memory["optimizer"] = 8 * trainable
    longest = max(config.runtime.tokens_per_batch, config.dataset.max_seq_len)
    memory |= _activations(config, model_config, longest, dense_bytes)
    if on_cuda:
        memory["cuda context"] = CONTEXT_BYTES
    memory["total"] = sum(memory.values())
    return Plan(
        model=name, bits=config.bits, parameters=parts, trainable_parameters=trainable, memory_bytes=memory,
        samples_per_step=config.optim.samples_per_step(num_ranks), tokens_per_pack=longest,
        peak_lr=config.optim.peak_lr(num_ranks), checkpoint_bytes=12 * trainable,
        fits={card: memory["total"] <= gib * 2**30 for card, gib in CARDS_GIB.items()},
    )  # fmt: skip


def _weights(config: Config, model: VisionLanguageModel, dense_bytes: int, on_cuda: bool) -> dict[str, int]:
    stored = {"language layers": 0, "embedding": 0, "head": 0, "vision tower": 0}
    for name, p in model.named_parameters():
        if p.requires_grad:
            continue
        part, bits = _storage(config, name, p.ndim)
        stored[part] += stored_bytes(p.shape[0], p[0].numel() if p.ndim > 1 else 1, bits, dense_bytes)
    share = share_of(config, model.language, dense_bytes, on_cuda=on_cuda)
    if share is not None:
        stored |= {"dequantisation buffer": share.scratch, "unpacked copies": share.copies}
    return stored


def _storage(config: Config, name: str, ndim: int) -> tuple[str, int]:
    """Part and bits of a frozen tensor."""
    if name.startswith("language.embed"):
        return "embedding", 16
    if name.startswith("language.head"):
        return "head", BITS[config.model.bits_head]
    in_layer = ".layers." in name and ndim == 2
    if name.startswith("vision"):
        return "vision tower", BITS[config.model.bits_vision] if in_layer else 16
    return "language layers", BITS[config.bits] if in_layer else 16


def _activations(config: Config, model: VLMConfig, tokens: int, dense_bytes: int) -> dict[str, int]:
    llm, tower = model.language, model.vision
    per_layer = dense_bytes * (6 * llm.dim + 2 * llm.ffn_dim)  # a token
    images = max(1, round(IMAGE_SHARE * tokens / 287))  # 287: mean length of a ScienceQA sample
    per_block = dense_bytes * (6 * tower.width + 2 * tower.mlp_dim) * tower.num_tokens * images
    if config.gradient_checkpointing:
        language = tokens * (dense_bytes * llm.dim * llm.num_layers + per_layer)
        vision = dense_bytes * tower.width * tower.num_tokens * images * tower.num_layers + per_block
    else:
        language = tokens * per_layer * llm.num_layers
        vision = per_block * tower.num_layers
    if model.train_vision == "frozen":
        vision = per_block
    dtype = torch.float32 if dense_bytes == 4 else torch.bfloat16
    logit_rows = min(tokens, chunk_rows(llm.vocab_size, dtype, MEMORY_BUDGET))
    return {
        "activations, language": language,
        "activations, vision": vision,
        "logits": logit_rows * llm.vocab_size * dense_bytes,
    }


def plan_without_weights(config: Config, num_ranks: int) -> Plan:
    """The plan of a command whose weight folders may not be here: a folder that is absent has the published shape that
    goes by its name (7B, 13B), and an absent tower is ViT-L/14.

    Raises:
        UsageError: the folder is absent and its name is no published size.
    """
    folder, path = base_paths(config)
    if folder.is_dir():
        language, name = open_language(folder).config, str(folder)
    elif folder.name in PUBLISHED:
        language, name = PUBLISHED[folder.name], f"{folder.name} (published shape; no weights at {folder})"
    else:
        raise UsageError(
            f"no weights at {folder}, and {folder.name!r} is no published size", where="--model.language",
            do=f"name a folder with weights, or one called {', '.join(PUBLISHED)}",
        )  # fmt: skip
    vision = open_vision(path).config if path is not None and path.exists() else ClipConfig()
    full = "full" in (config.train.language, config.train.vision)
    on_cuda = config.runtime.device != "cpu"
    in_32_bits = config.runtime.precision == "fp32" or (config.runtime.precision == "auto" and (full or not on_cuda))
    return make_plan(
        config, vlm_config(config, language, vision), name,
        num_ranks=num_ranks, dense_bytes=4 if in_32_bits else 2, on_cuda=on_cuda,
    )  # fmt: skip


def plan_text(plan: Plan) -> str:
    """The plan as the lines that stand before a run."""
    total = plan.memory_bytes["total"]
    parts = sorted(plan.memory_bytes.items(), key=lambda item: -item[1])
    lines = [
        f"model      {plan.model}, {plan.bits}",
        f"trains     {plan.trainable_parameters:,} of {sum(plan.parameters.values()):,} parameters",
        f"step       {plan.samples_per_step} samples in packs of {plan.tokens_per_pack:,} tokens, "
        f"peak learning rate {plan.peak_lr:.4g}",
        f"memory     {gib(total)} predicted: "
        + ", ".join(f"{name} {gib(size)}" for name, size in parts if name != "total" and size > total / 50),
        f"checkpoint {plan.checkpoint_bytes / 1e6:,.0f} MB",
    ]
    if "cuda context" in plan.memory_bytes:
        lines.append("fits       " + ", ".join(f"{card}: {'yes' if ok else 'no'}" for card, ok in plan.fits.items()))
    return "\n".join(lines)
