"""What a run ran on: versions, device, commit. Written to env.json, so that a figure can be traced to its machine."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

import torch

PACKAGES = ("torch", "triton", "numpy", "safetensors", "sentencepiece", "tokenizers", "bitsandbytes", "pillow")


def describe_environment(device: torch.device) -> dict[str, object]:
    """Versions of Python, of the packages that touch numbers, of the driver's CUDA; the device; our git commit."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_threads": torch.get_num_threads(),
        "device": device_name(device),
        "cuda": torch.version.cuda,
        "versions": {name: _version(name) for name in PACKAGES},
        "git_commit": git_commit(),
        "world_size": int(os.environ.get("WORLD_SIZE", "1")),
    }


def device_name(device: torch.device) -> str:
    """The card's name with its compute capability, or the processor's architecture."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"{torch.cuda.get_device_name(device)} (sm_{major}{minor})"
    return f"cpu ({platform.machine()})"


def git_commit() -> str | None:
    """The commit of this checkout, with a + where tracked files were changed; None outside of git."""
    git = shutil.which("git")
    if git is None:
        return None
    folder = Path(__file__).parent

    def ask(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([git, "-C", str(folder), *arguments], capture_output=True, text=True, check=False)

    head = ask("rev-parse", "HEAD")
    if head.returncode != 0:
        return None
    return head.stdout.strip() + ("+" if ask("diff", "--quiet", "HEAD").returncode == 1 else "")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
