"""The device and the dtype of a rank, on machines that are told."""

from __future__ import annotations

import pytest
import torch

from engine.errors import EnvironmentProblem, UsageError
from engine.precision import choose_device, choose_dtype


def machine(monkeypatch: pytest.MonkeyPatch, gpus: int, capability: tuple[int, int] = (8, 0)) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)


def test_each_rank_has_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, gpus=2)
    for wanted in ("auto", "cuda"):
        assert [choose_device(wanted, rank) for rank in (0, 1)] == [torch.device("cuda", 0), torch.device("cuda", 1)]
    assert choose_device("cpu", 7) == torch.device("cpu")


@pytest.mark.parametrize("wanted", ["auto", "cuda"])
def test_more_ranks_than_gpus(monkeypatch: pytest.MonkeyPatch, wanted: str) -> None:
    machine(monkeypatch, gpus=2)
    with pytest.raises(EnvironmentProblem, match="rank 2 of this machine has no GPU: torch sees 2") as caught:
        choose_device(wanted, 2)
    assert "--nproc_per_node 2" in caught.value.do


def test_a_machine_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, gpus=0)
    assert choose_device("auto", 3) == torch.device("cpu")
    with pytest.raises(UsageError, match="torch sees no CUDA GPU"):
        choose_device("cuda", 0)


@pytest.mark.parametrize(
    ("capability", "dtype"), [((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)]
)
def test_the_dtype_follows_the_card(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], dtype: torch.dtype
) -> None:
    machine(monkeypatch, gpus=1, capability=capability)
    gpu = torch.device("cuda", 0)
    assert choose_dtype("auto", gpu, full_training=False)[0] == dtype
    assert choose_dtype("auto", gpu, full_training=True)[0] == torch.float32
    assert choose_dtype("fp16", gpu, full_training=True) == (torch.float16, "asked for")
    assert choose_dtype("auto", torch.device("cpu"), full_training=False)[0] == torch.float32
