"""The doctor's check of every kernel on a GPU, without pytest. Exit code 1 where one is wrong, 4 without a GPU."""

from __future__ import annotations

import sys

import torch

from benchmarks.command import FAILED, require_gpu
from engine.op_checks import check_ops


def main() -> int:
    require_gpu()
    wrong = 0
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for op in check_ops(torch.device("cuda"), dtype):
            errors = f"forward {op.forward}, backward {op.backward}, allowed {op.allowed}"
            print(f"{'ok' if op.ok else 'WRONG':<6}{op.op:<28} {dtype!s:<16} {op.failure or errors}", flush=True)
            wrong += not op.ok
    print(f"{wrong} wrong")
    return FAILED if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
