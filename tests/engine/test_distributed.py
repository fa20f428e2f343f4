"""How a rank joins its group. What ranks do together is in tests/end_to_end."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from engine.distributed import ranks
from engine.errors import EnvironmentProblem


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What rank 1 of 2 tells torch, in order, on a machine with two GPUs."""
    heard: list[Any] = []
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "1"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", heard.append)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **o: heard.append((backend, o["device_id"])))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: heard.append("end"))
    return heard


def test_nccl_is_told_the_gpu_of_its_rank(calls: list[Any]) -> None:
    with ranks("cuda") as me:
        assert (me.rank, me.local_rank, me.world, me.is_main) == (1, 1, 2, False)
        calls.append("run")
    gpu = torch.device("cuda", 1)
    assert calls == [gpu, ("nccl", gpu), "run", "end"]


def test_gloo_needs_no_device(calls: list[Any]) -> None:
    with ranks("cpu"):
        pass
    assert calls == [("gloo", None), "end"]


def test_a_rank_without_a_gpu_does_not_join(calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(EnvironmentProblem, match="rank 1 of this machine has no GPU"), ranks("cuda"):
        pass
    assert calls == []


def test_a_single_process_has_no_group(calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name)
    with ranks("cuda") as me:
        assert (me.rank, me.world, me.is_main) == (0, 1, True)
    assert calls == []
