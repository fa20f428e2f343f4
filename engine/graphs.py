"""One pass over a pack, forward and backward: launched op by op, or as one CUDA graph where its shape was met before.

A pass of 32 layers is about 2,000 launches, which cost the host more time than the GPU where packs are small. A graph
is one launch. What it was captured with stays as it was, addresses and host values, so:

    inputs      are copied into buffers, one for each name and shape; a replay reads those. Shapes that need other
                buffers, and the one host value that attention gets (a bound on the longest segment), are the signature;
                engine/data/padding.py keeps signatures few
    seed, loss scale, sum of losses   are device tensors, filled before a replay; nothing else may change
    gradients   are added to the optimiser's buffers, in place
    memory      is one pool for all graphs and for passes launched op by op, which run one after another on one stream
                and leave nothing in it: two shapes do not need the memory of two
    weights     that are unpacked (kernels/unpacked.py) are unpacked anew in each pass, into a buffer of the pass's own

The first pass of a signature is launched op by op: it compiles and loads kernels, which a capture cannot, and makes
what is made once (cuBLAS workspaces, RoPE tables). The second is captured and replayed. At most `most` signatures are
captured, those that come twice first, for ever: which pass is a graph depends on the order of packs alone. Both ways
launch the same kernels, so a run's numbers do not depend on it.

The update is launched op by op: four kernels that read learning rate and scale from the device, launched while the last
graph runs. It could be a graph, but there is nothing to win.

Known traps, and where they are dealt with: autograd remembers the stream of each parameter's accumulation, so all
passes, the eager ones too, are on one stream that is not the default one; backward runs in a thread of its own, which
neither `use_mem_pool` nor a thread-local capture sees, so it is kept in the calling thread; threads of the loader pin
memory while a capture is under way, which is an error unless captures are thread-local; a pinned tensor that is freed
during a capture records an event in it, so the packs of a step are held until its end; torch.utils.checkpoint saves a
generator's state, which fails in a capture, unless told not to (dropout here is a hash).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from engine.tower_cache import FeatureTable, TowerCache
from kernels import unpacked
from kernels.dispatch import decisions
from models.pack import Pack, map_tensors, named_tensors

MOST_GRAPHS = 64
WAITING = ("reference", "sdpa")  # attention that asks the device for the lengths of segments

logger = logging.getLogger("nibble")


@dataclass(frozen=True, slots=True)
class Scalars:
    """What a pass reads and adds to besides its pack and the model; on the device, in the same place for ever."""

    seed: Tensor  # int64 [1], of dropout
    scale: Tensor  # fp32 [], what the loss is multiplied by before it is differentiated
    loss: Tensor  # fp32 [], the sum over the step's packs

    @classmethod
    def zeros(cls, device: torch.device) -> Scalars:
        scale, loss = torch.zeros((), device=device), torch.zeros((), device=device)
        return cls(seed=torch.zeros(1, dtype=torch.int64, device=device), scale=scale, loss=loss)


def run_pass(model: nn.Module, pack: Pack, scalars: Scalars) -> None:
    """Adds the gradients of the scaled loss to the parameters', and the loss to `scalars.loss`."""
    loss: Tensor = model(pack, scalars.seed)
    (loss * scalars.scale).backward()
    scalars.loss.add_(loss.detach())


class Passes:
    """Passes that are launched op by op. `features` is for packs that name images of a table (a frozen tower's)."""

    def __init__(self, device: torch.device, features: TowerCache | None = None) -> None:
        self.device = device
        self.features = features
        self.scalars = Scalars.zeros(device)

    @property
    def places(self) -> FeatureTable | None:
        """Of the images whose features are kept, for the loader."""
        return None if self.features is None else self.features.places

    def stream(self) -> AbstractContextManager[None]:
        """A whole step is launched inside of it."""
        return nullcontext()

    def run(self, model: nn.Module, pack: Pack) -> None:
        """`run_pass` of a pack that may still be on the host; the host does not wait."""
        pack = pack.to(self.device)
        run_pass(model, self._with_features(pack), self.scalars)

    def _with_features(self, pack: Pack) -> Pack:
        return pack if self.features is None else self.features.fill(pack)


class Recorder(Protocol):
    """What captures. A test puts another in its place."""

    def stream(self) -> AbstractContextManager[None]:
        """The stream of everything below."""

    def make_room(self) -> None:
        """Memory that is kept for others, and free, is to be had inside `memory`; may wait for the device."""

    def memory(self) -> AbstractContextManager[None]:
        """What is launched inside takes its memory where recordings take theirs, and keeps none that matters later."""

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """Records what `work` would launch, to no effect, on inputs that are there; returns what launches it all."""

    def obstacle(self) -> str:
        """Why what has run cannot be recorded; empty where it can."""


class CudaRecorder:
    """CUDA graphs on a stream and in a memory pool of their own."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.side = torch.cuda.Stream(device)
        self.pool = torch.cuda.MemPool()

    @contextmanager
    def stream(self) -> Iterator[None]:
        outer = torch.cuda.current_stream(self.device)
        self.side.wait_stream(outer)
        with torch.cuda.stream(self.side):
            yield
        outer.wait_stream(self.side)

    def make_room(self) -> None:
        torch.cuda.empty_cache()  # the allocator does not by itself, while a pool is in use

    @contextmanager
    def memory(self) -> Iterator[None]:
        with torch.cuda.use_mem_pool(self.pool, self.device), torch.autograd.set_multithreading_enabled(False):
            yield

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        pool: Any = self.pool.id  # torch has two types for it
        capture = torch.cuda.graph(graph, pool=pool, stream=self.side, capture_error_mode="thread_local")
        with torch.autograd.set_multithreading_enabled(False), capture:
            work()
        replay: Callable[[], None] = graph.replay
        return replay

    def obstacle(self) -> str:
        attention = decisions().get("attention", "")
        return f"attention is {attention}, which waits for the lengths of segments" if attention in WAITING else ""


# Name, shape and dtype of each tensor, and the bound on the longest segment.
Signature = tuple[object, ...]


def signature(pack: Pack) -> Signature:
    """What two packs must have in common for one graph to serve both."""
    tensors = ((name, tuple(tensor.shape), tensor.dtype) for name, tensor in named_tensors(pack).items())
    return (pack.segments.max_seqlen, *tensors)


@dataclass(frozen=True, slots=True)
class _Graph:
    inputs: Pack  # the buffers
    replay: Callable[[], None]


class GraphedPasses(Passes):
    """Passes that are replayed where their signature was met before. One model for the life of the object."""

    def __init__(
        self, device: torch.device, recorder: Recorder, features: TowerCache | None = None, most: int = MOST_GRAPHS
    ) -> None:
        super().__init__(device, features)
        self.recorder = recorder
        self.most = most
        self.replayed = self.launched = 0  # passes, one way and the other
        self._met: set[Signature] = set()
        self._graphs: dict[Signature, _Graph] = {}
        self._buffers: dict[object, Tensor] = {}
        self._off = False  # something cannot be captured

    def stream(self) -> AbstractContextManager[None]:
        return self.recorder.stream()

    def run(self, model: nn.Module, pack: Pack) -> None:
        if pack.feature_rows is not None:
            pack = self._with_features(pack.to(self.device))
        shape = signature(pack)
        graph = self._graphs.get(shape) or self._captured(model, pack, shape)
        if graph is None:
            self._launch(model, pack)
            return
        _copy(pack, graph.inputs)
        graph.replay()
        self.replayed += 1

    def _captured(self, model: nn.Module, pack: Pack, shape: Signature) -> _Graph | None:
        """A new graph, where it is time for one."""
        if self._off or len(self._graphs) >= self.most:
            return None
        if shape not in self._met:
            self._met.add(shape)
            self.recorder.make_room()
            return None
        inputs = self._inputs(pack)
        _copy(pack, inputs)

        def work() -> None:
            run_pass(model, inputs, self.scalars)
            unpacked.forget()

        try:
            graph = _Graph(inputs, self.recorder.record(work))
        except RuntimeError as error:
            unpacked.forget()
            self._give_up(f"a capture failed: {type(error).__name__}: {error}")
            return None
        self._graphs[shape] = graph
        logger.info("CUDA graph %d of at most %d: %s", len(self._graphs), self.most, shape)
        return graph

    def _launch(self, model: nn.Module, pack: Pack) -> None:
        with self.recorder.memory():
            run_pass(model, pack.to(self.device), self.scalars)
            unpacked.forget(memory=True)
        self.launched += 1
        if not self._off and (obstacle := self.recorder.obstacle()):
            self._give_up(obstacle)

    def _give_up(self, why: str) -> None:
        self._off = True
        logger.warning("no CUDA graphs from here on: %s", why)

    def _inputs(self, pack: Pack) -> Pack:
        """Buffers in the shapes of `pack`, shared by all graphs: each is filled just before its replay."""
        buffers = []
        for name, tensor in named_tensors(pack).items():
            key = (name, tuple(tensor.shape), tensor.dtype)
            if key not in self._buffers:
                self._buffers[key] = torch.empty_like(tensor, device=self.device)
            buffers.append(self._buffers[key])
        following = iter(buffers)
        return replace(map_tensors(pack, lambda _: next(following)), num_samples=-1)  # nothing captured may read it


def _copy(pack: Pack, inputs: Pack) -> None:
    for source, buffer in zip(named_tensors(pack).values(), named_tensors(inputs).values(), strict=True):
        buffer.copy_(source, non_blocking=True)
