"""LoRA merged into weights: the formula, one rounding, and adapters of other models."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models.adapters.lora import LoRAConfig
from models.weights.errors import WeightsError
from models.weights.write.entries import tensor_entries
from models.weights.write.merge import merge_lora

CONFIG = LoRAConfig(rank=3, alpha=7.0)


def lora(rows: int = 6, columns: int = 8, rank: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(rank, columns, generator=generator), torch.randn(rows, rank, generator=generator)
    return {"layers.0.mlp.up.lora.a": a, "layers.0.mlp.up.lora.b": b}


def weights(dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    names = ("layers.0.mlp.up.weight", "layers.0.mlp.down.weight")
    return {name: torch.randn(6, 8, generator=generator).to(dtype) for name in names}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_update_is_added_in_fp32_and_rounded_once(dtype: torch.dtype) -> None:
    base, adapter = weights(dtype), lora()
    merged = merge_lora(tensor_entries(base), adapter, CONFIG, "here")
    a, b = (adapter[f"layers.0.mlp.up.lora.{side}"] for side in "ab")
    exact = base["layers.0.mlp.up.weight"].double() + 7 / 3 * (b.double() @ a.double())
    got = merged["layers.0.mlp.up.weight"].value("up")
    assert got.dtype == dtype
    rounded = exact.to(dtype)
    # At a tie fp32's own error may decide: at most one unit in the last place, nearly nowhere.
    assert (got != rounded).sum() <= (48 if dtype == torch.float32 else 1)
    torch.testing.assert_close(got.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-6)
    assert torch.equal(merged["layers.0.mlp.down.weight"].value("down"), base["layers.0.mlp.down.weight"])
    assert not torch.equal(got, base["layers.0.mlp.up.weight"])


def test_the_base_is_left_as_it_is() -> None:
    base = weights(torch.float32)
    before = base["layers.0.mlp.up.weight"].clone()
    merge_lora(tensor_entries(base), lora(), CONFIG, "here")["layers.0.mlp.up.weight"].value("up")
    assert torch.equal(base["layers.0.mlp.up.weight"], before)


def test_a_lora_of_another_model_lists_all_that_is_wrong() -> None:
    adapter = lora(rows=5) | {"layers.7.mlp.up.lora.a": torch.zeros(3, 8)} | {
        "layers.0.mlp.down.lora.a": torch.zeros(3, 8)
    }  # fmt: skip
    with pytest.raises(WeightsError) as caught:
        merge_lora(tensor_entries(weights(torch.float32)), adapter, CONFIG, "runs/x", do="name its base")
    assert caught.value.missing == ["layers.0.mlp.down.lora.b"]
    assert caught.value.extra == ["layers.7.mlp.up.lora.a"]
    assert caught.value.mismatched == ["layers.0.mlp.up.lora.b: got 5x3, expected 6x3"]
    assert caught.value.file == "runs/x" and caught.value.do == "name its base"
