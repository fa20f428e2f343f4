"""Keys and values of B sequences that are being generated.

The prompts are prefilled as one pack; `slots` says for each packed row which place of the cache it fills (rows that
are never looked back at, such as modality tokens and filling, point behind the end). Then each step decodes one token
a sequence.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from kernels.decode_attention import decode_attention


class LayerCache:
    """One layer's keys and values [B, P, G, d], and the router's weights that the prefill found."""

    def __init__(self, owner: KVCache) -> None:
        self.owner = owner
        self.mix: dict[int, Tensor] = {}  # adapter site -> [R, 2]
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    @property
    def decoding(self) -> bool:
        return self.owner.decoding

    def fill(self, k: Tensor, v: Tensor) -> None:
        """Stores the prefill's k and v [T, G, d] at the owner's slots."""
        owner = self.owner
        size = owner.batch_size * owner.max_length
        stored = []
        for x in (k, v):
            flat = x.new_zeros(size + 1, *x.shape[1:])  # the last row takes what nobody looks back at
            flat.index_copy_(0, owner.slots, x)
            stored.append(flat[:size].unflatten(0, (owner.batch_size, owner.max_length)))
        self.keys, self.values = stored

    def attend(self, q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> Tensor:
        """One new token a sequence: q [B, H, d], k and v [B, G, d] -> [B, H, d]. It sees `window` tokens, itself among
        them; None: all."""
        assert self.keys is not None and self.values is not None
        return decode_attention(q, k, v, self.keys, self.values, self.owner.lengths, window=window)


@dataclass
class KVCache:
    """The caches of all layers: B sequences of at most P tokens each."""

    num_layers: int
    batch_size: int
    max_length: int
    slots: Tensor  # int64 [T]: b * P + position for each prefilled row, B * P for rows that nobody looks back at
    lengths: Tensor  # int64 [B]: tokens stored so far
    decoding: bool = False
    layers: list[LayerCache] = field(init=False)

    def __post_init__(self) -> None:
        self.layers = [LayerCache(self) for _ in range(self.num_layers)]
