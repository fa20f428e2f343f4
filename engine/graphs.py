"""One pass over a pack, forward and backward: launched op by op, or as one CUDA graph where its shape was met before.

A pass of 32 layers is about 2,000 launches, which cost the host more time than the GPU where packs are small. A graph
is one launch. What it was captured with stays as it was, addresses and host values, so:

    inputs      are copied into buffers, one for each name and shape; a replay reads those. Shapes that need other
                buffers, and the one host value that attention gets (a bound on the longest segment), are the signature;
                engine/data/padding.py keeps signatures few
    seed, loss scale, sum of losses   are device tensors, filled before a replay; nothing else may change
    gradients   are added to the optimiser's buffers, in place
    memory      is one pool for all graphs and for passes launched op by op, which run one after another on one stream:
                two shapes do not need the memory of two. What a pass leaves in it (what is made once, see below) may
                lie where an earlier graph writes: those graphs are given up and captured again, in a new pool.
                Blocks that are too small for a later pass stay in the pool: a step that finds no memory is repeated
                with a new one, and then without unpacked copies (engine/step.py)
    weights     that are unpacked (kernels/unpacked.py) are unpacked anew in each pass, into a buffer of the pass's own

The first pass of a signature is launched op by op: it compiles and loads kernels, which a capture cannot, and makes
what is made once (cuBLAS workspaces, RoPE tables). The second is captured and replayed. At most `most` signatures are
captured, those that come twice first, for ever: which pass is a graph depends on the order of packs alone. Both ways
launch the same kernels, so a run's numbers do not depend on it.

Where something cannot be captured, or attention waits for the device, graphs and pool are given back, and the run goes
on as without them. So are they at its end: evaluation may need the memory.

The update is launched op by op: four kernels that read learning rate and scale from the device, launched while the last
graph runs. It could be a graph, but there is nothing to win.

Known traps, and where they are dealt with: autograd remembers the stream of each parameter's accumulation, so all
passes, the eager ones too, are on one stream that is not the default one; backward runs in a thread of its own, which
neither `use_mem_pool` nor a thread-local capture sees, so it is kept in the calling thread; threads of the loader pin
memory while a capture is under way, which is an error unless captures are thread-local; a pinned tensor that is freed
during a capture records an event in it, so the packs of a step are held until its end; torch.utils.checkpoint saves a
generator's state, which fails in a capture, unless told not to (dropout here is a hash); memory that the allocator
keeps for others is not given up for a pool in use, so it is freed before; after a capture that CUDA has refused to end,
torch's allocator believes that it is still in it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
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

    @property
    def keeps_memory(self) -> bool:
        """Whether there may be memory that only passes can use."""
        return False

    def release(self) -> None:
        """Gives that memory back; there may be passes later."""


class Recorder(Protocol):
    """What captures. A test puts another in its place."""

    def stream(self) -> AbstractContextManager[None]:
        """The stream of everything below."""

    def memory(self) -> AbstractContextManager[None]:
        """What is launched inside takes its memory where recordings take theirs; may wait for the device."""

    def held(self) -> int:
        """Bytes of that memory that are in use."""

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """Records what `work` would launch, to no effect, on inputs that are there; returns what launches it all."""

    def obstacle(self) -> str:
        """Why what has run cannot be recorded; empty where it can."""

    def release(self, drop: Callable[[], object]) -> None:
        """Waits for the device, lets `drop` forget all recordings, and gives the memory back; there may be new ones."""


class CudaRecorder:
    """CUDA graphs on a stream and in a memory pool of their own."""

    def __init__(self, device: torch.device) -> None:
        index = torch.cuda.current_device() if device.index is None else device.index
        self.device = torch.device("cuda", index)  # a pool wants it by number
        self.side = torch.cuda.Stream(self.device)
        self.pool = torch.cuda.MemPool()

    @contextmanager
    def stream(self) -> Iterator[None]:
        outer = torch.cuda.current_stream(self.device)
        self.side.wait_stream(outer)
        with torch.cuda.stream(self.side):
            yield
        outer.wait_stream(self.side)

    @contextmanager
    def memory(self) -> Iterator[None]:
        torch.cuda.empty_cache()  # the allocator does not by itself, while a pool is in use
        with torch.cuda.use_mem_pool(self.pool, self.device), torch.autograd.set_multithreading_enabled(False):
            yield

    def held(self) -> int:
        return sum(segment["allocated_size"] for segment in self.pool.snapshot())

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        pool: Any = self.pool.id  # torch has two types for it
        capture = torch.cuda.graph(graph, pool=pool, stream=self.side, capture_error_mode="thread_local")
        try:
            with torch.autograd.set_multithreading_enabled(False), capture:
                work()
        except BaseException:
            self._leave_capture()
            raise
        replay: Callable[[], None] = graph.replay
        return replay

    def _leave_capture(self) -> None:
        """Undoes what capture_begin did to the allocator, where capture_end did not come to that."""
        with suppress(RuntimeError):  # it did
            torch._C._cuda_endAllocateToPool(self.device.index, self.pool.id)
            torch._C._cuda_releasePool(self.device.index, self.pool.id)

    def release(self, drop: Callable[[], object]) -> None:
        torch.cuda.synchronize(self.device)
        drop()
        self.pool = torch.cuda.MemPool()  # the old one goes with its last graph, but for what is still in use

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
        self._held = 0  # bytes in the recorder's memory that were there before the graphs
        self._off = False  # something cannot be captured

    def stream(self) -> AbstractContextManager[None]:
        return self.recorder.stream()

    def run(self, model: nn.Module, pack: Pack) -> None:
        if self._off:
            super().run(model, pack)
            self.launched += 1
            return
        if pack.feature_rows is not None:
            pack = self._with_features(pack.to(self.device))
        shape = signature(pack)
        graph = self._graphs.get(shape) or self._captured(model, pack, shape)
        if graph is None:
            self._launch(model, pack)
            self._met.add(shape)  # not before: a pass that found no memory has not loaded all kernels
            return
        _copy(pack, graph.inputs)
        graph.replay()
        self.replayed += 1

    @property
    def keeps_memory(self) -> bool:
        return not self._off

    def release(self) -> None:
        """Graphs are gone with it; shapes that were met are captured when they come again."""
        unpacked.forget(memory=True)
        self.recorder.release(self._graphs.clear)
        self._buffers.clear()
        self._held = 0

    def _captured(self, model: nn.Module, pack: Pack, shape: Signature) -> _Graph | None:
        """A new graph, where it is time for one."""
        if shape not in self._met or len(self._graphs) >= self.most:
            return None
        inputs = self._inputs(pack)
        _copy(pack, inputs)

        def work() -> None:
            run_pass(model, inputs, self.scalars)
            unpacked.forget()

        graph, why = None, ""
        try:
            graph = _Graph(inputs, self.recorder.record(work))
        except RuntimeError as error:  # no longer than this does it keep what the pass had
            why = f"a capture failed: {type(error).__name__}: {error}"
        if graph is None:
            self._give_up(why)
            return None
        self._graphs[shape] = graph
        logger.info("CUDA graph %d of at most %d: %s", len(self._graphs), self.most, shape)
        return graph

    def _launch(self, model: nn.Module, pack: Pack) -> None:
        if self._off:  # since just now
            run_pass(model, pack.to(self.device), self.scalars)
        else:
            unpacked.forget(memory=True)  # of other streams, too: the pool cannot have it otherwise
            with self.recorder.memory():
                run_pass(model, pack.to(self.device), self.scalars)
                unpacked.forget(memory=True)
            self._check()
        self.launched += 1

    def _check(self) -> None:
        """After a pass in the recorder's memory."""
        if obstacle := self.recorder.obstacle():
            self._give_up(obstacle)
            return
        held = self.recorder.held()
        if held > self._held and self._graphs:
            logger.info(
                "CUDA graphs: %d are captured again, a pass left %d bytes", len(self._graphs), held - self._held
            )
            self.release()
        else:
            self._held = held

    def _give_up(self, why: str) -> None:
        self._off = True
        self.release()
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
