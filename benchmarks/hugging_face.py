"""transformers' LLaMA with PEFT's LoRA and bitsandbytes' 4 bits, at its best settings, with or without Liger's kernels.

SDPA, gradient checkpointing, fp32 LoRA (r = 8 on q and v: 4.2 M parameters of 7B, LaVIN's adapters have 3.8 M) under
bf16 autocast, four samples a micro-batch, padded on the right to the longest. No mask is passed: with padding on the
right causality hides it, and SDPA keeps its fastest path. Norms, embedding and head stay bf16 (PEFT's helper would
make them fp32). fused AdamW; the host waits once a step, for its loss.

Images: an image's six tokens are text here, and no vision tower runs, in LaVIN's adapters' stead neither forward nor
backward. That is less work than ours: ratios to these trainers are lower bounds.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.peers import empty_linear4bit
from benchmarks.problem import normal, seeded
from benchmarks.trainers import BETAS, LR, WEIGHT_DECAY, pinned
from benchmarks.workload import Workload
from engine.data.sample import IGNORE
from models.language.llama import LlamaConfig

MICRO_BATCH = 4
RANK = 8
TARGETS = ["q_proj", "v_proj"]
MODELING = "transformers.models.llama.modeling_llama"
PATCHED = ("apply_rotary_pos_emb", "LlamaRMSNorm", "LlamaMLP")  # what Liger replaces in that module


@dataclass(frozen=True, slots=True)
class Batch:
    """Micro-batches [4, S], and the step's number of targets."""

    ids: list[Tensor]
    labels: list[Tensor]
    targets: int


class HuggingFaceTrainer:
    """`liger`: with Liger's RoPE, RMSNorm, SwiGLU and fused linear cross-entropy."""

    def __init__(
        self, config: LlamaConfig, device: torch.device, *, liger: bool = False, dtype: torch.dtype = torch.bfloat16
    ) -> None:
        self.device, self.dtype = device, dtype
        self.warm_ups, self.borrowed_bytes = 1, 0
        base = _base(config, device, dtype)
        self.module: Any = importlib.import_module(MODELING)
        self.patches: dict[str, Any] = {}
        if liger:
            self._apply_liger(base)
        peft: Any = importlib.import_module("peft")
        lora = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=TARGETS, task_type="CAUSAL_LM")
        self.model = peft.get_peft_model(base, lora)
        base.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})  # nothing is random
        self.model.train()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            trained, lr=LR, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=device.type == "cuda"
        )

    def _apply_liger(self, base: Any) -> None:
        """On this model alone: what Liger changes in transformers' module holds during its own steps only, so that it
        does not serve the other trainer of the process."""
        patching: Any = importlib.import_module("liger_kernel.transformers")
        before = {name: getattr(self.module, name) for name in PATCHED}
        patching.apply_liger_kernel_to_llama(model=base)
        self.patches = {name: getattr(self.module, name) for name in PATCHED}
        for name, value in before.items():
            setattr(self.module, name, value)

    def prepare(self, work: Workload) -> Batch:
        ids: list[Tensor] = []
        labels: list[Tensor] = []
        for first in range(0, len(work.samples), MICRO_BATCH):
            samples = work.samples[first : first + MICRO_BATCH]
            longest = max(len(sample.input_ids) for sample in samples)
            for padded, fill, rows in (
                (ids, 0, [sample.input_ids for sample in samples]),
                (labels, IGNORE, [sample.labels for sample in samples]),
            ):
                padded.append(pinned(torch.tensor([r + [fill] * (longest - len(r)) for r in rows]), self.device))
        return Batch(ids, labels, work.supervised)

    def step(self, batch: Batch) -> float:
        total = torch.zeros((), device=self.device)
        targets = torch.tensor(batch.targets).to(self.device, non_blocking=True)
        with self._patched():
            for ids, labels in zip(batch.ids, batch.labels, strict=True):
                ids, labels = (part.to(self.device, non_blocking=True) for part in (ids, labels))
                with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.dtype != torch.float32):
                    loss = self.model(input_ids=ids, labels=labels, num_items_in_batch=targets, use_cache=False).loss
                loss.backward()
                total += loss.detach().float()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total.item()

    def launched(self) -> str:
        return ""

    @contextmanager
    def _patched(self) -> Iterator[None]:
        before = {name: getattr(self.module, name) for name in self.patches}
        for name, value in self.patches.items():
            setattr(self.module, name, value)
        try:
            yield
        finally:
            for name, value in before.items():
                setattr(self.module, name, value)


def _base(config: LlamaConfig, device: torch.device, dtype: torch.dtype) -> Any:
    """transformers' model with random weights, quantised one by one as they are drawn."""
    transformers: Any = importlib.import_module("transformers")
    modeling: Any = importlib.import_module(MODELING)
    shape = transformers.LlamaConfig(
        vocab_size=config.vocab_size, hidden_size=config.dim, intermediate_size=config.ffn_dim,
        num_hidden_layers=config.num_layers, num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads, rms_norm_eps=config.norm_eps, max_position_embeddings=2048,
        attn_implementation="sdpa", dtype=dtype, bos_token_id=1, eos_token_id=2, use_cache=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = modeling.LlamaForCausalLM(shape)
    model.model.rotary_emb = modeling.LlamaRotaryEmbedding(shape).to(device)
    generator = seeded(device, 1)
    for name, module in list(model.named_modules()):
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            scale = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 1.0
            weight = normal(generator, *parameter.shape, dtype=dtype, scale=scale)
            if isinstance(module, nn.Linear) and ".layers." in name:
                model.set_submodule(name, _linear4bit(weight, dtype))
            else:
                setattr(module, leaf, nn.Parameter(weight, requires_grad=False))
    model.is_loaded_in_4bit = True  # PEFT then wraps Linear4bit as such
    return model


def _linear4bit(weight: Tensor, dtype: torch.dtype) -> nn.Module:
    modules: Any = importlib.import_module("bitsandbytes.nn")
    layer: Any = empty_linear4bit(weight.shape[0], weight.shape[1], dtype)
    stored = modules.Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=True, module=layer)
    layer.weight = stored.to(weight.device)  # quantises
    layer.quant_state = layer.weight.quant_state
    return layer
