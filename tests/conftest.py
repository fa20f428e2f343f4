"""Without a GPU the Triton kernels run in Triton's interpreter, and csrc's in its emulator, where a test asks for them.

TRITON_INTERPRET must be set before triton is imported, hence here.
"""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    os.environ.setdefault("NIBBLE_EMULATE", "1")
    os.environ.setdefault("NIBBLE_KERNELS", "reference")
