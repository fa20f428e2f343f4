"""Without a GPU the Triton kernels run in Triton's interpreter, and only where a test asks for them.

Both variables must be set before triton is imported, hence here.
"""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    os.environ.setdefault("NIBBLE_KERNELS", "reference")
