"""`did you mean`, in one place for flags and for the keys of a file."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

# What other trainers call it.
ALIASES = {
    "learning_rate": "optim.lr", "num_train_epochs": "optim.epochs", "per_device_train_batch_size": "optim.batch_size",
    "gradient_accumulation_steps": "optim.accum_iter", "max_grad_norm": "optim.clip_grad",
    "model_max_length": "dataset.max_seq_len", "warmup_ratio": "optim.warmup_epochs",
}  # fmt: skip


def closest(name: str, known: Iterable[str]) -> str | None:
    """The most similar known name, or the one that means what another trainer calls so; None where nothing is similar.

    A name without its group ("lr") is compared with the last part of the paths too, so that it finds "optim.lr".
    """
    paths = list(known)
    by_last = {path.rpartition(".")[2]: path for path in reversed(paths)}
    exact = by_last.get(name.rpartition(".")[2])
    if exact is not None:
        return exact
    also = {alias: path for alias, path in ALIASES.items() if path in paths}
    close = difflib.get_close_matches(name, [*paths, *by_last, *also], n=1, cutoff=0.6)
    return by_last.get(close[0], also.get(close[0], close[0])) if close else None


def did_you_mean(name: str, known: Iterable[str], prefix: str = "") -> str:
    """`did you mean --optim.lr?` (with prefix "--"), or an empty string where nothing is similar."""
    match = closest(name, known)
    return f"did you mean {prefix}{match}?" if match else ""
