"""Fixtures of the kernel tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from kernels import dispatch


@pytest.fixture
def device() -> torch.device:
    """A GPU where there is one; else the CPU, where Triton runs in its interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(params=["reference", "triton"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once with each backend chosen explicitly."""
    previous = dispatch.set_backend(request.param)
    yield request.param
    dispatch.set_backend(previous)


@pytest.fixture
def triton_backend() -> Iterator[None]:
    previous = dispatch.set_backend("triton")
    yield
    dispatch.set_backend(previous)
