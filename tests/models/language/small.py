"""Small decoders of every family, two segments of tokens for them, and the same blocks in plain fp32 torch."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from models.adapters.mma import AdapterConfig
from models.language.decoder import Context, Decoder, DecoderConfig, Layer
from models.pack import Segments
from tests.models.drawn import CPU, drawn
from tests.models.shapes import DIM, language

SEED = torch.tensor([7])
LENGTHS = (6, 3)
TOKENS = sum(LENGTHS)
FFN = 24
_SIZES = {"vocab_size": 20, "num_kv_heads": 2, "ffn_dim": FFN}
CONFIGS: dict[str, DecoderConfig] = {
    "llama": language("llama", **_SIZES),
    "llama of HF": language("llama-3", **_SIZES),
    "phi": language("phi", **_SIZES, residual_dropout=0.4),
    "phi3": language("phi3", **_SIZES, window=3),
    "stablelm": language("stablelm", **_SIZES),
    "dropped": language("llama", **_SIZES, residual_dropout=0.4, o_bias=True, mlp_bias=True),
}

ADAPTER = AdapterConfig(scale=0.7, temperature=2.0, dropout=0.0)


def decoder(config: DecoderConfig) -> Decoder:
    """Random numbers, all base weights frozen."""
    return drawn(Decoder(config)).requires_grad_(False)


def pack(layers: Iterable[Layer], bits: int) -> None:
    """Quantizes the linears of the blocks."""
    for linear in (linear for layer in layers for group in layer.groups() for linear in group):
        assert linear.weight is not None
        linear.quantize(linear.weight.data, bits=bits, device=CPU, name="w")


def context(model: Decoder, seed: Tensor | None = None) -> Context:
    """Of two segments, the rows 0 and 6 of which route."""
    positions = torch.cat([torch.arange(length, dtype=torch.int32) for length in LENGTHS])
    cu_seqlens = torch.tensor([0, *LENGTHS], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    segment_of = torch.repeat_interleave(cu_seqlens.diff())
    return Context(
        segments=Segments(
            cu_seqlens=cu_seqlens, max_seqlen=max(LENGTHS), position_ids=positions, router_row=segment_of.int()
        ),
        router_rows=cu_seqlens[:-1].long(), rope=model.rope_table(max(LENGTHS), CPU), seed=seed, segment_of=segment_of,
    )  # fmt: skip


def x_of(rows: int = TOKENS, seed: int = 1) -> Tensor:
    return torch.randn(rows, DIM, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def stream(model: Decoder, x: Tensor, of: Context) -> Tensor:
    """x [T, D] -> the residual stream after all blocks."""
    delta: Tensor | None = None
    for layer in model.blocks():
        x, delta = layer(x, delta, of)
    assert delta is not None
    return x + delta


def plain_stream(model: Decoder, x: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """The same without dropout from the decoder's weights, each segment by itself; MMA adapters are ADAPTER's."""
    rows = []
    for part in x.split(LENGTHS):
        for i in range(model.config.num_layers):
            prefix = f"layers.{i}."
            own = {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}
            part = _block(model.config, own, part)
        rows.append(part)
    return torch.cat(rows)


def _block(c: DecoderConfig, w: dict[str, Tensor], x: Tensor) -> Tensor:
    n = _norm(c, w, "attention_norm", x)
    attended = _attention(c, w, _adapted(w, "attention_adapter", n))
    if c.family == "phi":
        return x + attended + _linear(w, "mlp.down", F.gelu(_linear(w, "mlp.up", n), approximate="tanh"))
    x = x + attended
    n = _adapted(w, "mlp_adapter", _norm(c, w, "mlp_norm", x))
    if c.family == "phi3":
        gate, up = _linear(w, "mlp.gate_up", n).chunk(2, dim=1)
    else:
        gate, up = _linear(w, "mlp.gate", n), _linear(w, "mlp.up", n)
    return x + _linear(w, "mlp.down", F.silu(gate) * up)


def _norm(c: DecoderConfig, w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    weight, bias = w[f"{name}.weight"], w.get(f"{name}.bias")
    if bias is None:
        return F.rms_norm(x, (c.dim,), weight, c.norm_eps)
    return F.layer_norm(x, (c.dim,), weight, bias, c.norm_eps)


def _adapted(w: dict[str, Tensor], name: str, n: Tensor) -> Tensor:
    """n [T, D] behind an MMA adapter, where there is one: the segment's first token routes."""
    if f"{name}.down.weight" not in w:
        return n
    mix = (_linear(w, f"{name}.router", n[0]) / ADAPTER.temperature).softmax(-1)
    codes = _linear(w, f"{name}.down", n).chunk(2, dim=1)
    for part, share in zip(("up0", "up1"), mix, strict=True):
        halves = w[f"{name}.{part}.weight"].chunk(2, dim=0)
        paths = [code @ half.T for code, half in zip(codes, halves, strict=True)]
        n = n + ADAPTER.scale * share * (torch.cat(paths, dim=1) + w[f"{name}.{part}.bias"])
    return n


def _linear(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))


def _attention(c: DecoderConfig, w: dict[str, Tensor], x: Tensor) -> Tensor:
    if c.family == "phi3":
        q, k, v = _linear(w, "attention.qkv", x).split([c.dim, c.kv_dim, c.kv_dim], dim=1)
    else:
        q, k, v = (_linear(w, f"attention.{name}", x) for name in "qkv")
    q, k, v = (part.unflatten(1, (-1, c.head_dim)).transpose(0, 1) for part in (q, k, v))  # [H, T, d]
    repeats = c.num_heads // c.num_kv_heads
    k, v = (part.repeat_interleave(repeats, dim=0) for part in (k, v))
    scores = _turned(c, q) @ _turned(c, k).transpose(1, 2) / c.head_dim**0.5
    ago = torch.arange(len(x))[:, None] - torch.arange(len(x))
    seen = (ago >= 0) & (ago < (c.window or len(x)))
    out = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v
    return _linear(w, "attention.o", out.transpose(0, 1).flatten(1))


def _turned(c: DecoderConfig, x: Tensor) -> Tensor:
    """x [H, T, d], its pairs as complex numbers."""
    r = c.rotary_dim or c.head_dim
    turning, rest = x[..., :r], x[..., r:]
    pairs = turning.unflatten(-1, (r // 2, 2)) if c.rope_interleaved else turning.unflatten(-1, (2, r // 2)).mT
    angle = torch.outer(torch.arange(x.shape[1]), c.rope_theta ** (-torch.arange(0, r, 2) / r))
    turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones(()), angle))
    return torch.cat((turned.flatten(-2) if c.rope_interleaved else turned.mT.flatten(-2), rest), dim=-1)
