"""Without a GPU the Triton kernels run in Triton's interpreter, and csrc's in its emulator, where a test asks for them.

TRITON_INTERPRET must be set before triton is imported, hence here.
"""

from __future__ import annotations

import os

import pytest
import torch

os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")  # as in runs: torch's products are the same wherever tensors lie

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    os.environ.setdefault("NIBBLE_EMULATE", "1")
    os.environ.setdefault("NIBBLE_KERNELS", "reference")


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What tests quantize is not kept beside a person's models; a demo that is unpacked there already serves here."""
    from engine.demo.cache import cache_root

    unpacked, here = sorted(cache_root().glob("demo-*")), tmp_path_factory.mktemp("cache")
    for folder in unpacked:
        (here / folder.name).symlink_to(folder.resolve())
    os.environ["NIBBLE_CACHE"] = str(here)
