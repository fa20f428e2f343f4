"""Which dtype activations and 16-bit frozen weights have, and why."""

from __future__ import annotations

import torch

from engine.errors import EnvironmentProblem, UsageError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def choose_device(wanted: str, local_rank: int) -> torch.device:
    """`auto`, `cpu` or `cuda` -> the device of this rank.

    Raises:
        UsageError: cuda was asked for and there is none.
        EnvironmentProblem: there are more ranks on this machine than GPUs.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            "--runtime.device cuda, but torch sees no CUDA GPU", do="python doctor.py, or leave it at auto"
        )
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= (count := torch.cuda.device_count()):
        raise EnvironmentProblem(
            f"rank {local_rank} of this machine has no GPU: torch sees {count}", where="torchrun --nproc_per_node",
            do=f"--nproc_per_node {count}, or --runtime.device cpu",
        )  # fmt: skip
    return torch.device("cuda", local_rank)


def choose_dtype(wanted: str, device: torch.device, *, full_training: bool) -> tuple[torch.dtype, str]:
    """-> (dtype, reason). bf16 from sm_80 on, fp16 before, fp32 on the CPU and where base weights themselves train."""
    if wanted != "auto":
        return DTYPES[wanted], "asked for"
    if full_training:
        return torch.float32, "base weights train, and their updates need 32 bits"
    if device.type == "cpu":
        return torch.float32, "on a CPU"
    major, minor = torch.cuda.get_device_capability(device)
    if major >= 8:
        return torch.bfloat16, f"sm_{major}{minor} computes in bf16"
    return torch.float16, f"sm_{major}{minor} has no bf16"
