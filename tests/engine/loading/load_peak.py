"""Loads models, one after another, in a process of its own. Prints a line of JSON for each: the most anonymous memory
that loading took, beyond what was there before.

    python -m tests.engine.loading.load_peak FOLDER ...

RssAnon of /proc/self/status, asked for every few milliseconds by a thread, is what cannot be dropped: heap, and pages
of mapped files that were written to. Pages that are only mapped (RssFile) are the page cache's and may go at any time,
so VmHWM, the most of both together, would say nothing. A tensor that lives for less than the thread's rhythm is smaller
than what a core writes in that time, which is within the tolerance of the test.
"""

from __future__ import annotations

import gc
import json
import sys
import threading
import time
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from engine.build import Sources, build_model
from engine.config import Config, Model
from engine.demo.cache import demo_base
from engine.image_choices import choose_images
from engine.loading.cache import cache_of
from models.weights.host_memory import trim_heap
from models.weights.language import open_language
from models.weights.towers import open_vision

SECONDS = 0.002


def memory(kind: str) -> int:
    """Bytes of RssAnon or RssFile."""
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith(kind))
    return int(line.split()[1]) * 1024


class Peak:
    """The most of each kind that a thread saw."""

    def __init__(self) -> None:
        self.most = {"RssAnon": 0, "RssFile": 0}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def _watch(self) -> None:
        while not self._stop.wait(SECONDS):
            for kind in self.most:
                self.most[kind] = max(self.most[kind], memory(kind))

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()


def load(folder: str | Path) -> tuple[nn.Module, bool]:
    """The language model in 4 bits, head too, with the demo's small tower; and whether the cache knew it."""
    config = Config(bits_head="4bit", model=Model(language=str(folder)))
    tower = open_vision(demo_base() / "tower")
    sources = Sources(open_language(folder), tower, cast(Any, None), choose_images(config, tower.config))
    cache = cache_of(config, sources.language, sources.vision, torch.bfloat16)
    cached = cache is not None and cache.folder.is_dir()
    return build_model(config, sources, device=torch.device("cpu"), dtype=torch.bfloat16), cached


def measure(folder: str) -> dict[str, float]:
    """Bytes at most while `folder` is loaded, and of the model that comes of it."""
    gc.collect()
    trim_heap()  # nothing that the last model left behind is there to be filled anew unseen
    before = {kind: memory(kind) for kind in ("RssAnon", "RssFile")}
    started = time.perf_counter()
    with Peak() as peak:
        model, cached = load(folder)
    seconds = time.perf_counter() - started
    stored = sum(p.nbytes for p in model.parameters())
    taken = {kind: peak.most[kind] - before[kind] for kind in before}
    return {**taken, "stored": stored, "seconds": seconds, "cached": cached}


def main(*folders: str) -> None:
    torch.set_num_threads(1)
    load(demo_base())  # what torch imports and allocates on first use is not the model's
    for folder in folders:
        print(json.dumps(measure(folder)))


if __name__ == "__main__":
    main(*sys.argv[1:])
