"""What a person sees when something is wrong, and the exit code that a script sees.

Every error has four parts: what was wrong (with the value), where (file and row, or flag), why in one clause, and what
to do (a command to type where there is one). None of them shows a traceback unless --debug is given.

    error[data]: row 1841 names an image that is not there: 'train/123.png'
      where: my.json, row 1841
      why: 37 of 12,726 rows point outside the folder
      do: pass --image_folder with the folder that holds train/
"""

from __future__ import annotations

import errno
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import ClassVar

logger = logging.getLogger("nibble")

INTERRUPTED = 130  # the shell's code for Ctrl-C outside of training, where nothing has to be saved


class NibbleError(Exception):
    """An error that a person can act on. Subclasses say which kind it is and with which code the process ends."""

    exit_code: ClassVar[int] = 1
    kind: ClassVar[str] = "nibble"

    def __init__(self, what: str, *, where: str = "", why: str = "", do: str = "") -> None:
        super().__init__(what)  # args = (what,), and the rest lives in __dict__: the error survives a process border
        self.what = what
        self.where = where
        self.why = why
        self.do = do

    def __str__(self) -> str:
        lines = [f"error[{self.kind}]: {self.what}"]
        parts = (("where", self.where), ("why", self.why), ("do", self.do))
        lines += [f"  {label}: {text}" for label, text in parts if text]
        return "\n".join(lines)


class UsageError(NibbleError):
    """A flag, a recipe or a combination of them is wrong."""

    exit_code = 2
    kind = "usage"


class DataError(NibbleError):
    """A data file, a row or an image is wrong."""

    exit_code = 3
    kind = "data"


class EnvironmentProblem(NibbleError):
    """Something that is installed, or the machine itself, does not fit."""

    exit_code = 4
    kind = "environment"


class OutOfMemory(NibbleError):
    """The device does not hold what was asked of it."""

    exit_code = 5
    kind = "memory"


class NotFinite(NibbleError):
    """A loss or a gradient is NaN or infinite."""

    exit_code = 6
    kind = "not finite"


class CheckpointError(NibbleError):
    """A checkpoint or a weight file is missing, damaged or of another model."""

    exit_code = 7
    kind = "checkpoint"


class Stopped(NibbleError):
    """A signal asked for a stop; the state is saved and the run can be resumed."""

    exit_code = 75
    kind = "stopped"


# What to do about errors of the layers below, which do not know this module.
_USE_LESS = (
    "lower --runtime.tokens_per_batch (and --max_batch_size of eval.py --generate), or give --gradient_checkpointing "
    "or --bits 4bit"
)
_LET_NIBBLE_CHOOSE = "--runtime.kernels auto, or NIBBLE_KERNELS=auto"
# By class name: importing them here would import torch.
_FROM_BELOW: dict[str, tuple[type[NibbleError], str]] = {
    "TowerLoRAError": (
        CheckpointError,
        "train again with LoRA on the language model only, or give --train.vision lora",
    ),
    "WeightsError": (CheckpointError, ""),
    "NothingInstalled": (EnvironmentProblem, ""),  # a BackendError whose text says what to do
    "BackendError": (EnvironmentProblem, _LET_NIBBLE_CHOOSE),
    "OutOfMemoryError": (OutOfMemory, _USE_LESS),  # of a GPU
    "MemoryError": (OutOfMemory, _USE_LESS),
}
# In the text of a plain RuntimeError of torch, or of its AcceleratorError.
_CPU_ALLOCATOR = "DefaultCPUAllocator: can't allocate memory"
_OF_A_GPU = (
    "CUDA error: out of memory", "CUDA driver error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)  # fmt: skip


def as_nibble_error(error: BaseException) -> NibbleError | None:
    """The error as one of ours, or None where it is a defect that deserves its traceback."""
    if isinstance(error, NibbleError):
        return error
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:  # no memory for a file to be mapped, or a process
        return OutOfMemory(error.strerror or str(error), where=str(error.filename or ""), do=_USE_LESS)
    if isinstance(error, OSError):
        return EnvironmentProblem(error.strerror or str(error), where=str(error.filename or ""))
    if isinstance(error, RuntimeError) and any(text in str(error) for text in (_CPU_ALLOCATOR, *_OF_A_GPU)):
        return OutOfMemory(str(error), do=_USE_LESS)
    for base in type(error).__mro__:
        if base.__name__ in _FROM_BELOW:
            kind, do = _FROM_BELOW[base.__name__]
            return kind(str(error) or "out of memory", do=do)
    return None


def is_of_a_gpu(error: BaseException) -> bool:
    """Whether it is a GPU whose memory has ended, and not the host's."""
    names = {base.__name__ for base in type(error).__mro__}
    return "OutOfMemoryError" in names or any(text in str(error) for text in _OF_A_GPU)


def run_command(main: Callable[[list[str]], int | None], argv: Sequence[str] | None = None) -> int:
    """Run a command's main(argv) and return the exit code of the process.

    `argv` excludes the program's name and is sys.argv[1:] by default. A known error is printed on stderr without its
    traceback (which goes to the "nibble" logger at debug level, and to stderr with --debug); an unknown one is raised.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return main(arguments) or 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output has left, as `head` does: nothing is wrong, nobody listens
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains when it flushes at exit
        return 0
    except (NibbleError, ValueError, RuntimeError, OSError, MemoryError) as error:
        known = as_nibble_error(error)
        if known is None:
            raise
        logger.debug("the traceback of the error below", exc_info=error)
        if "--debug" in arguments:
            traceback.print_exception(error)
        print(known, file=sys.stderr)
        return known.exit_code
