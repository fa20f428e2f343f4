"""safetensors as a stream: safetensors' own reader is the oracle."""

from __future__ import annotations

import resource
import signal
import zlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from engine.tensor_file import TensorWriter, file_size, write_tensors

TENSORS = {
    "codes": torch.arange(7, dtype=torch.uint8), "int8": torch.ones(3, 5, dtype=torch.int8),
    "wide": torch.randn(4, 3).double(), "half": torch.randn(5, 2).half(), "empty": torch.empty(0, 3),
    "scalar": torch.tensor(2.5), "turned": torch.randn(3, 4).t(),
}  # fmt: skip
SPECS = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in TENSORS.items()}


@pytest.mark.parametrize("backwards", [False, True])
def test_tensors_may_arrive_in_any_order(tmp_path: Path, backwards: bool) -> None:
    path = tmp_path / "w.safetensors"
    writer = TensorWriter(path, SPECS)
    for name in sorted(TENSORS, reverse=backwards):
        crc = writer.write(name, TENSORS[name])
        assert crc == zlib.crc32(TENSORS[name].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    assert writer.finish() == path.stat().st_size == file_size(SPECS)
    found = load_file(path)
    assert found.keys() == TENSORS.keys()
    assert {name: tensor.dtype for name, tensor in found.items()} == {name: spec[0] for name, spec in SPECS.items()}
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())
    write_tensors(tmp_path / "whole.safetensors", TENSORS)
    assert (tmp_path / "whole.safetensors").stat().st_size == file_size(SPECS)


def test_what_is_given_up_on_a_full_disk_closes_without_an_error(tmp_path: Path) -> None:
    """A small tensor waits in a buffer, which close() writes: the disk that refused it once refuses it again."""
    limit, signal_was = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    writer = TensorWriter(tmp_path / "w", {"a": (torch.uint8, (4096,)), "b": (torch.uint8, (1 << 20,))})
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, limit[1]))
    try:
        with pytest.raises(OSError):
            writer.write("a", torch.zeros(4096, dtype=torch.uint8))
            writer.write("b", torch.zeros(1 << 20, dtype=torch.uint8))
        writer.close()
        with pytest.raises(OSError):
            TensorWriter(tmp_path / "headers", {f"{i:064}": (torch.uint8, (1,)) for i in range(400)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, signal_was)


def test_a_tensor_that_was_not_announced_is_refused(tmp_path: Path) -> None:
    writer = TensorWriter(tmp_path / "w", SPECS)
    writer.write("codes", TENSORS["codes"])
    for name, tensor in (("codes", TENSORS["codes"]), ("other", torch.ones(1)), ("half", torch.ones(5, 2))):
        with pytest.raises(ValueError, match=f"tensor {name} is"):
            writer.write(name, tensor)
    with pytest.raises(ValueError, match="6 tensors never came"):
        writer.finish()
    writer.close()
