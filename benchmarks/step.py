"""A decoder layer with NF4 weights and an MMA adapter, forward and backward (goal G14), and a whole optimiser step.

Tokens are packs of ScienceQA-like lengths. Least operations: 4 for each weight of a product and token (forward and dX;
frozen weights have no dW), the head's on supervised rows only, and 14 s^2 H d / 2 for attention within the samples.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from benchmarks import command, lengths
from benchmarks.peers import require_csrc
from benchmarks.problem import TRAINING, Bench, Case, Cost, Inputs, Problem, Variant, normal, products
from engine.data.packing import collate, token_weights
from engine.data.sample import IGNORE, Sample
from engine.distributed import Ranks
from engine.optim import Optimizer
from engine.scaler import LossScaler
from engine.step import dropout_seed, train_step
from kernels import dispatch, unpacked
from kernels.dequantize_nf4 import dequantize_nf4_reference
from kernels.int8 import Int8Tensor
from models.adapters.mma import AdapterConfig
from models.adapters.names import is_adapter
from models.language.decoder import Context, DecoderConfig, Layer, make_layer
from models.language.llama import LLAMA_7B, LLAMA_13B, LlamaConfig
from models.linear import Linear
from models.norm import Norm
from models.pack import Pack
from models.placement import fill
from models.vision.clip import ClipConfig
from models.vlm import VisionLanguageModel, VLMConfig

MODELS = {
    "7B": LLAMA_7B,
    "13B": LLAMA_13B,
    "tiny": LlamaConfig(vocab_size=96, dim=64, num_layers=2, num_heads=2, num_kv_heads=2, ffn_dim=96),
    # bitsandbytes on a CPU takes weights whose rows are whole blocks
    "toy": LlamaConfig(vocab_size=96, dim=64, num_layers=2, num_heads=2, num_kv_heads=2, ffn_dim=128),
}
TOWER = ClipConfig(width=64, num_layers=6, num_heads=1, image_size=28, mlp_dim=64)  # text only: it does not run
PROMPT_SHARE = 0.3  # of a sample's tokens that are no targets: LaVIN's prompts have 87 of 287
DTYPE = torch.bfloat16
ADAPTER = AdapterConfig()


def cases() -> list[Case]:
    def case(part: str, model: str, layers: int, tokens: int, quick: bool = True) -> Case:
        shape = {"part": part, "model": model, "layers": layers, "T": tokens}
        return Case("step", shape, modes=TRAINING if part == "layer" else ("step",), quick=quick)

    return [
        case("layer", "7B", 1, 2048),
        case("layer", "7B", 1, 8192),
        case("layer", "13B", 1, 2048, quick=False),
        case("train_step", "7B", 4, 2048),
    ]


def problem(case: Case, device: torch.device) -> Problem:
    part, model, layers, tokens = (case.shape[key] for key in ("part", "model", "layers", "T"))
    vlm, pack = build(MODELS[model], layers, device), text_pack(tokens, MODELS[model].vocab_size)
    return _layer(vlm, pack, device) if part == "layer" else _train_step(vlm, pack, device)


def build(
    config: LlamaConfig, layers: int, device: torch.device, *, tower: ClipConfig = TOWER, bits: int = 4,
    dtype: torch.dtype = DTYPE, adapter: AdapterConfig = ADAPTER, ups: float = 0.1,
) -> VisionLanguageModel:  # fmt: skip
    """LaVIN's joint model with `layers` blocks of this shape, as `random_model` makes it."""
    shape = VLMConfig(language=replace(config, num_layers=layers), vision=tower, adapter=adapter)
    return random_model(shape, device, bits=bits, dtype=dtype, ups=ups)


def random_model(
    config: VLMConfig, device: torch.device, *, bits: int = 4, dtype: torch.dtype = DTYPE, ups: float = 0.1
) -> VisionLanguageModel:
    """A model with random weights, the language model's blocks in `bits`: drawn on the device and quantised there, one
    tensor at a time.

    `ups` is the standard deviation of the adapters' up-projections, which are zero at the start of a training: that
    would be faster.
    """
    with torch.device("meta"):
        vlm = VisionLanguageModel(config)
    generator = torch.Generator(device).manual_seed(0)

    def weights(part: nn.Module) -> Iterator[tuple[str, Tensor]]:
        for name, p in list(part.named_parameters()):  # filling it puts packed weights among them
            if not is_adapter(name):
                scale = p.shape[-1] ** -0.5 if p.ndim > 1 else 1.0
                yield name, normal(generator, *p.shape, scale=scale)

    for part in (vlm.language, vlm.vision):
        in_layers = bits if part is vlm.language else 16

        def bits_of(name: str, in_layers: int = in_layers) -> int:
            return in_layers if name.startswith("layers.") else 16

        fill(part, weights(part), bits=bits_of, device=device, dtype=dtype, source="random weights")
    vlm.start_trainable(0, device)
    for name, parameter in vlm.trainable().items():
        is_up = ("_adapter.up" in name and name.endswith("weight")) or name.endswith(".lora.b")
        if ups and is_up:
            nn.init.normal_(parameter, std=ups, generator=generator)
    return vlm


def text_pack(tokens: int, vocabulary: int) -> Pack:
    """Text samples of ScienceQA-like lengths that fill `tokens`."""
    generator = torch.Generator().manual_seed(0)
    samples = []
    for i, length in enumerate(lengths.pack(tokens - 2)):
        ids = torch.randint(3, vocabulary, (length,), generator=generator).tolist()
        prompt = max(1, round(PROMPT_SHARE * length))
        samples.append(Sample(str(i), ids, [IGNORE] * prompt + ids[prompt:], None, [], False))
    return collate(samples, token_weights(samples, "token"), [None] * len(samples))


def _layer(vlm: VisionLanguageModel, pack: Pack, device: torch.device) -> Problem:
    block = vlm.language.blocks()[0]
    config, segments = vlm.language.config, pack.to(device).segments
    tokens = pack.input_ids.numel()
    context = Context(
        segments=segments, router_rows=pack.modality_rows.to(device), seed=None,
        rope=vlm.language.rope_table(segments.max_seqlen + 1, device),
    )  # fmt: skip
    adapter = {name: p.detach() for name, p in block.named_parameters() if "_adapter." in name}

    def draw(generator: torch.Generator) -> Inputs:
        stream = {name: normal(generator, tokens, config.dim) for name in ("x", "delta")}
        return stream | {name: p.clone() for name, p in adapter.items()}

    def layer(of: Layer, inputs: Inputs) -> tuple[Tensor, ...]:
        trained = {name: inputs[name] for name in adapter}
        x, delta = torch.func.functional_call(of, trained, (inputs["x"], inputs["delta"], context))
        return x, delta

    def nibble(inputs: Inputs) -> tuple[Tensor, ...]:
        unpacked.forget()  # a step comes to this layer from another one, not from its own backward
        return layer(block, inputs)

    def reference(inputs: Inputs) -> tuple[Tensor, ...]:
        with reference_kernels():
            return layer(_wide(block, config, device), inputs)

    flops = (4 * block_weights(config) * tokens, 4 * _pairs(pack) * config.dim)
    return Problem(
        draw=draw,
        differentiable=("x", "delta", *adapter),
        reference=reference,
        variants=(Variant("nibble", lambda: require_csrc(nibble)),),
        cost=products(flops[0] / 2 + flops[1], flops[0] / 2 + 2.5 * flops[1]),
        tolerance=3e-2,  # a chain of ten 16-bit results
    )


def _train_step(vlm: VisionLanguageModel, pack: Pack, device: torch.device) -> Problem:
    config, layers = vlm.language.config, len(vlm.language.blocks())
    optimizer, scaler, ranks = Optimizer(vlm.named_parameters(), weight_decay=0.02), LossScaler(False), Ranks(0, 0, 1)

    def step(inputs: Inputs) -> tuple[Tensor, ...]:
        """With a learning rate of zero, so that every call computes the same loss."""
        result = train_step(
            vlm, [inputs["pack"]], optimizer, scaler, ranks, step=0, seed=0, lr=0.0, clip_grad=1.0, device=device
        )
        return (torch.tensor(result.loss),)

    def reference(inputs: Inputs) -> tuple[Tensor, ...]:
        with reference_kernels(), torch.no_grad():
            seed = torch.tensor([dropout_seed(0, 0, 0)], device=device)
            return (vlm(inputs["pack"].to(device), seed).cpu(),)

    tokens, supervised = pack.input_ids.numel(), int((pack.weights > 0).sum())
    head = config.vocab_size * config.dim * supervised
    flops = layers * (4 * block_weights(config) * tokens + 14 * _pairs(pack) * config.dim) + 4 * head
    return Problem(
        draw=lambda generator: {"pack": pack},
        differentiable=(),
        reference=reference,
        variants=(Variant("nibble", lambda: require_csrc(step)),),
        cost={"step": Cost(flops=round(flops))},
    )


def block_weights(config: DecoderConfig) -> int:
    """Weights of one block's products."""
    attention = 2 * config.dim * (config.dim + config.num_kv_heads * config.head_dim)
    return attention + 3 * config.dim * config.ffn_dim


def _pairs(pack: Pack) -> float:
    """Pairs of tokens that attend to each other, the diagonal counted half."""
    return float((pack.segments.cu_seqlens.diff().double() ** 2).sum() / 2)


def _wide(block: Layer, config: DecoderConfig, device: torch.device) -> Layer:
    """The block in fp32, with the weights that the quantized ones stand for."""
    with torch.device(device):
        wide = make_layer(config, block.index)
        for name in ("attention_adapter", "mlp_adapter"):
            setattr(wide, name, getattr(block, name))
    for name, module in wide.named_modules():
        original = block.get_submodule(name)
        if isinstance(module, Linear) and isinstance(original, Linear):
            stored = original.frozen_weight()
            assert not isinstance(stored, Int8Tensor)
            exact = stored.float() if isinstance(stored, Tensor) else dequantize_nf4_reference(stored, torch.float32)
            module.weight = nn.Parameter(exact, requires_grad=False)
        elif isinstance(module, Norm) and isinstance(original, Norm):
            module.weight = nn.Parameter(original.weight.detach().float(), requires_grad=False)
    return wide


@contextmanager
def reference_kernels() -> Iterator[None]:
    previous = dispatch.set_backend("reference")
    try:
        yield
    finally:
        dispatch.set_backend(previous)


BENCH = Bench("step", __doc__ or "", cases, problem, tiny={"model": "tiny", "T": 128})

if __name__ == "__main__":
    sys.exit(command.main(BENCH, sys.argv[1:]))
