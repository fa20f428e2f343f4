"""The Mixture-of-Modality adapter of LaVIN (arXiv 2305.15023): two rank-8 paths mixed by a router.

    n = norm(x)
    u = dropout(n A^T + a)                                A `down` [h, D]
    e0, e1 = two grouped up-projections of u              `up0`, `up1` [D, h/2]: the first half of the output reads
                                                          the first half of u, the second half the second
    w = softmax((n_router W^T + v) / temperature)         W `router` [2, D]; n_router is the routing token's n
    y = n + scale * (w0 e0 + w1 e1)

The adapter stands between a norm and the attention (or MLP) that follows it, so one operation does both. In a language
model the routing token is the modality token; in a tower every token routes itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kernels.dropout import keep_mask
from kernels.norm_mma import add_norm_mma
from kernels.router import Router, router_mix
from models.norm import Norm
from models.recompute import recomputed


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterConfig:
    """The numbers that all adapters of a model share."""

    dim: int = 8  # bottleneck h, split in two groups
    scale: float = 1.0  # s
    temperature: float = 10.0  # of the router's softmax: 10 for LaVIN-7B, 5 for 13B
    dropout: float = 0.1  # on the code u


class MMAdapter(nn.Module):
    """The routed adapter: `down`, `up0`, `up1`, `router`. `site` numbers its dropout stream within the model."""

    def __init__(self, dim: int, config: AdapterConfig, site: int) -> None:
        super().__init__()
        self.config = config
        self.site = site
        self.down = nn.Linear(dim, config.dim)
        self.up0 = nn.Linear(config.dim // 2, dim)
        self.up1 = nn.Linear(config.dim // 2, dim)
        self.router = nn.Linear(dim, 2)

    def reset(self) -> None:
        """LaVIN's start: the adapter is the identity, since both up-projections are zero."""
        nn.init.xavier_uniform_(self.down.weight)
        nn.init.zeros_(self.down.bias)
        for up in (self.up0, self.up1):
            nn.init.zeros_(up.weight)
            nn.init.zeros_(up.bias)
        self.router.reset_parameters()

    def mix(self, norm: Norm, x: Tensor) -> Tensor:
        """The router's weights [R, 2], fp32, of routing tokens x [R, D] (before the norm)."""
        return router_mix(norm(x), self.router.weight, self.router.bias, self.config.temperature)

    def mix_all(self, norm: Norm, x: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor]:
        """The stream x + delta [T, D], and the router's weights [T, 2] of each of its tokens.

        The norm that they are read from is computed again in the backward pass: kept in fp32, as the router's
        gradient wants it, it would be as much as two streams.
        """

        def body(x: Tensor, delta: Tensor | None) -> tuple[Tensor, ...]:
            x, n = norm.add(x, delta)
            return x, x, router_mix(n, self.router.weight, self.router.bias, self.config.temperature)

        x, mix = recomputed(body, None, x, delta, (*norm.parameters(), *self.router.parameters()))
        return x, mix

    def routed_by(self, rows: Tensor) -> Router:
        """This adapter's router over the tokens `rows` int64 [R]; `forward` takes it in place of their mix."""
        return Router(self.router.weight, self.router.bias, self.config.temperature, rows)

    def forward(
        self, norm: Norm, x: Tensor, delta: Tensor | None, mix: Tensor | Router, row: Tensor | None,
        seed: Tensor | None, *, as_sum: bool = False,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """x, delta [T, D] -> the stream x + delta (x without a delta) and its adapted norm, [T, D] each.

        `mix` [R, 2] and `row` [T] say how each token is routed (None: its own row); `seed` int64 [1] switches dropout
        on; `as_sum`: of the stream that a call with a delta returned, get the same bits."""
        return add_norm_mma(
            x, delta, norm.weight, norm.bias, norm.eps,
            self.down.weight, self.down.bias, self.up0.weight, self.up0.bias, self.up1.weight, self.up1.bias,
            mix, row, scale=self.config.scale, dropout=self.config.dropout, seed=seed, site=self.site,
            as_sum=as_sum,
        )  # fmt: skip


class PlainAdapter(nn.Module):
    """RepAdapter without a router (`normal`): y = n + scale * up(dropout(down n)).

    LaVIN's own `normal` lost the residual and the scale; `legacy` reproduces that.
    """

    def __init__(self, dim: int, config: AdapterConfig, site: int, *, legacy: bool) -> None:
        super().__init__()
        self.config = config
        self.site = site
        self.legacy = legacy
        self.down = nn.Linear(dim, config.dim)
        self.up0 = nn.Linear(config.dim // 2, dim)

    def reset(self) -> None:
        """The identity at the start (zeros, under `legacy`)."""
        nn.init.xavier_uniform_(self.down.weight)
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up0.weight)
        nn.init.zeros_(self.up0.bias)

    def forward(self, norm: Norm, x: Tensor, delta: Tensor | None, seed: Tensor | None) -> tuple[Tensor, Tensor]:
        """As MMAdapter's, without a router."""
        x, n = norm.add(x, delta)
        u = F.linear(n, self.down.weight.to(n.dtype), self.down.bias.to(n.dtype))  # [T, h]
        if seed is not None and self.config.dropout > 0:
            p = self.config.dropout
            u = u * keep_mask(seed, self.site, u.shape[0], u.shape[1], p, u.device) / (1 - p)
        half_code, half_dim = u.shape[1] // 2, n.shape[1] // 2
        weight = self.up0.weight.to(n.dtype)
        e = torch.cat((u[:, :half_code] @ weight[:half_dim].T, u[:, half_code:] @ weight[half_dim:].T), dim=1)
        e = e + self.up0.bias.to(n.dtype)
        return x, e if self.legacy else n + self.config.scale * e
