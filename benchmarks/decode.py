"""Writing one token with the whole 7B model: NF4 layers with MMA adapters, a 16-bit head, `seen` tokens cached (G13).

Least bytes: every weight of the layers and of the head once, 3.6 GB, and the cached keys and values. The goal's limit,
1,332 tokens/s, is that of the weights alone at an H200's nominal 4.8 TB/s, above what a copy reaches. The step is a
CUDA graph where nothing in it waits for the device.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from benchmarks import command
from benchmarks.peers import require_csrc
from benchmarks.problem import Bench, Case, Cost, Inputs, Problem, Variant, normal, seeded
from benchmarks.step import DTYPE, MODELS, build, reference_kernels
from models.adapters.mma import MMAdapter
from models.cache import KVCache
from models.linear import Linear
from models.vlm import VisionLanguageModel

ROOM = 16  # places of the cache beyond what is seen


def cases() -> list[Case]:
    def case(layers: int, batch: int, quick: bool) -> Case:
        return Case("decode", {"model": "7B", "layers": layers, "B": batch, "seen": 256}, modes=("step",), quick=quick)

    return [case(32, 1, True), case(32, 8, False), case(2, 1, False)]


def problem(case: Case, device: torch.device) -> Problem:
    model, layers, batch, seen = (case.shape[key] for key in ("model", "layers", "B", "seen"))
    vlm = build(MODELS[model], layers, device).eval()
    cache = _cache(vlm, batch, seen, device)
    vocabulary = vlm.language.config.vocab_size

    def draw(generator: torch.Generator) -> Inputs:
        tokens = torch.randint(3, vocabulary, (batch,), generator=generator, device=device)
        return {"tokens": tokens, "seen": torch.full((batch,), seen, device=device)}

    def step(inputs: Inputs) -> tuple[Tensor, ...]:
        with torch.no_grad():
            cache.lengths.copy_(inputs["seen"])
            routed = torch.zeros(batch, dtype=torch.int32, device=device)
            positions = (inputs["seen"] + 1).int()
            return (vlm.logits(vlm.decode(inputs["tokens"], positions, routed, cache)),)

    def reference(inputs: Inputs) -> tuple[Tensor, ...]:
        with reference_kernels():
            return step(inputs)

    return Problem(
        draw=draw,
        differentiable=(),
        reference=reference,
        variants=(Variant("nibble", lambda: require_csrc(step)),),
        cost={"step": Cost(bytes=_weight_bytes(vlm) + _cached_bytes(vlm, batch, seen))},
        # the reference is 16-bit too; on a CPU a step in bf16 is 0.009 sqrt(layers) away from fp32, at a width of 1,024
        tolerance=0.02 * layers**0.5,
    )


def _cache(vlm: VisionLanguageModel, batch: int, seen: int, device: torch.device) -> KVCache:
    """`seen` random keys and values a sequence and layer, and an even mix of every adapter's two paths."""
    config, generator = vlm.language.config, seeded(device, 1)
    none = torch.zeros(0, dtype=torch.int64, device=device)
    cache = KVCache(
        num_layers=config.num_layers, batch_size=batch, max_length=seen + ROOM, slots=none,
        lengths=torch.full((batch,), seen, device=device), decoding=True,
    )  # fmt: skip
    shape = (batch, seen + ROOM, config.num_kv_heads, config.head_dim)
    for layer, block in zip(cache.layers, vlm.language.blocks(), strict=True):
        layer.keys, layer.values = (normal(generator, *shape, dtype=DTYPE) for _ in range(2))
        for adapter in block.modules():
            if isinstance(adapter, MMAdapter):
                layer.mix[adapter.site] = torch.full((2, 2), 0.5, device=device)
    return cache


def _weight_bytes(vlm: VisionLanguageModel) -> int:
    """Of the products of one token: as stored, head included; norms and adapters are below 0.2 %."""
    layers = [module for module in vlm.language.modules() if isinstance(module, Linear)]
    return sum(layer.frozen_weight().nbytes for layer in layers)


def _cached_bytes(vlm: VisionLanguageModel, batch: int, seen: int) -> int:
    config = vlm.language.config
    return 2 * config.num_layers * batch * seen * config.num_kv_heads * config.head_dim * DTYPE.itemsize


BENCH = Bench("decode", __doc__ or "", cases, problem, tiny={"model": "tiny", "layers": 2, "seen": 16})

if __name__ == "__main__":
    sys.exit(command.main(BENCH, sys.argv[1:]))
