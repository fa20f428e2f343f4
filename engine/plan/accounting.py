"""What a training pass over one pack takes, layer by layer: memory, FLOPs and bytes, counted without computing.

A cut-down model (engine/plan/meta_model.py) runs forward and backward on meta tensors under each policy, by the code
that trains (kernels/counting.py). Where layers begin is marked, and the whole is composed from a layer among its like:

    saved      by how much a layer's forward makes grow what is alive when a layer starts
    handed     the rest of what is alive then: both parts of the stream, as far as no layer keeps them, and the little
               that is alive all the while (projector, image tokens)
    forward    the most that is alive in a layer's forward, above what is alive when it starts
    inner      the most that is alive in its backward, above what the layers before it keep, that is with the gradients
               that come back to it
    peak       the same of the last layer, which is the dearest, since the loss hands it gradients of both parts of the
               stream; and of what comes between this stage and the next
    after      the most that is alive in the head and the loss, above what all layers keep

The peak of a step is exact, whatever each layer keeps (activation_policy.py adds it up), but for two things that are
small: of the tower's blocks, which differ by a stream or two where a tap lies between, the dearest stands for all; and
with drop path the 4 bytes a token that say which segment it is in outlive the forward pass if any layer recomputes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

from engine.plan.activation_policy import Choice, Layers
from engine.plan.meta_model import META, Bits, PackShape, cut_down, largest_group, pack_bytes, pack_of
from kernels import unpacked
from kernels.counting import Counter, Op, counting
from models.pack import Pack
from models.recompute import POLICIES, ActivationPolicy, Policy
from models.vlm import VisionLanguageModel, VLMConfig

Pass = Literal["forward", "backward", "between", "after", "behind"]


@dataclass(frozen=True, slots=True)
class Work:
    """The ops of one layer."""

    forward: tuple[Op, ...]
    backward: Mapping[Policy, tuple[Op, ...]]


@dataclass(frozen=True, slots=True)
class Costs:
    """Of one pack, forward and backward. Bytes; the seconds of choices are a card's to say, and 0 here."""

    vision: Layers
    language: Layers
    after: int
    inputs: int  # the pack itself
    buffers: int  # for unpacked weights, and tables: there from the first pack on
    tables: int  # of these, the tables
    vision_work: Work
    language_work: Work
    other_work: tuple[Op, ...]  # embedding, the tower's ends, projector, head and loss

    def peak(self, policy: ActivationPolicy) -> int:
        """The most that is alive in a pass, above `inputs` and `buffers`."""
        vision, language = self.saved(policy)
        in_tower = self.vision.peak(policy.vision)
        return max(in_tower, vision + self.language.peak(policy.language), vision + language + self.after)

    def saved(self, policy: ActivationPolicy) -> tuple[int, int]:
        """What tower and language model keep for their backward pass."""
        return self.vision.saved(policy.vision), self.language.saved(policy.language)


@cache
def costs(
    config: VLMConfig, bits: Bits, shape: PackShape, dtype: torch.dtype, capability: int, *, scratch: int = 0
) -> Costs:
    """Counts a pack of this shape on this model, with activations in `dtype`, as a card of this compute capability
    would run it (kernels/launches.py; 0: Triton's interpreter and csrc's emulator).

    scratch: bytes of the buffer for unpacked weights; it takes the largest group's at least.
    """
    model = cut_down(config, bits, dtype)
    pack = pack_of(shape, config)
    ring = max(scratch, largest_group(model, dtype))
    runs: dict[Policy, _Run] = {}
    with unpacked.apart(ring, dtype, META), counting(capability) as counter:
        with torch.no_grad():
            model(pack)  # makes what stays: tables, a larger buffer
        buffers = ring + counter.live
        for policy in POLICIES:
            unpacked.forget()
            runs[policy] = _Run(counter, model, shape)
            runs[policy].go(pack, policy)
    vision = {policy: run.vision() for policy, run in runs.items()}
    language = {policy: run.language() for policy, run in runs.items()}
    works = [_work(runs, stage, 1) for stage in ("vision", "language")]

    def layers(count: int, found: Mapping[Policy, _Memory]) -> Layers:
        return Layers(count, {policy: found[policy].choice() for policy in POLICIES}, found["save_all"].start)

    return Costs(
        vision=layers(config.vision.layers_run, vision),
        language=layers(config.language.num_layers, language),
        after=min(run.after() for run in runs.values()),
        inputs=pack_bytes(pack), buffers=buffers, tables=buffers - ring,
        vision_work=works[0], language_work=works[1],
        other_work=tuple(runs["save_all"].other_ops()),
    )  # fmt: skip


def _work(runs: Mapping[Policy, _Run], stage: str, index: int) -> Work:
    return Work(
        tuple(runs["save_all"].ops("forward", stage, index)),
        {policy: tuple(run.ops("backward", stage, index)) for policy, run in runs.items()},
    )


@dataclass(frozen=True, slots=True)
class _Memory:
    """Of a layer, under one policy: as in Choice; `start`: what is alive when the first layer starts."""

    saved: int
    peak: int
    inner: int
    handed: int
    forward: int
    start: int

    def choice(self) -> Choice:
        return Choice(self.saved, self.peak, 0.0, self.inner, self.handed, self.forward)


@dataclass
class _Segment:
    """What happened from one mark to the next."""

    what: Pass
    stage: str
    index: int  # of the layer
    before: int  # bytes alive at its start, above those before the pass
    mark: int
    peak: int = 0
    ops: Sequence[Op] = ()


class _Run:
    """One pass over a pack, cut into segments."""

    def __init__(self, counter: Counter, model: VisionLanguageModel, shape: PackShape) -> None:
        self.counter, self.model, self.shape = counter, model, shape
        self.num_vision, self.num_language = len(model.vision.layers), len(model.language.layers)
        self.segments: list[_Segment] = []
        self.seed = torch.empty(1, dtype=torch.int64, device=META)
        self.start = counter.live

    def go(self, pack: Pack, policy: Policy) -> None:
        model = self.model
        model.use_activation_policy(ActivationPolicy.uniform(policy, self.num_language, self.num_vision))
        with ExitStack() as hooks:
            for stage, blocks in (("vision", model.vision.blocks()), ("language", model.language.blocks())):
                for index, block in enumerate(blocks):
                    for handle in self._watch(stage, index, block, index == len(blocks) - 1):
                        hooks.callback(handle.remove)
            self._mark("between")
            model(pack, self.seed).backward()
        self._close()

    def _watch(self, stage: str, index: int, block: nn.Module, is_last: bool) -> Iterator[Any]:
        def enter(_: nn.Module, arguments: tuple[Any, ...]) -> None:
            self._mark("forward", stage, index)
            if stage == "language" and index == 0 and arguments[0].requires_grad:
                arguments[0].register_hook(lambda _: self._mark("behind"))

        def leave(_: nn.Module, __: tuple[Any, ...], outputs: tuple[Tensor, Tensor]) -> None:
            if is_last:
                self._mark("between" if stage == "vision" else "after")
            if outputs[1].requires_grad:  # the stream's second part: its gradient is the last that a layer waits for
                outputs[1].register_hook(lambda _: self._mark("backward", stage, index))

        yield block.register_forward_pre_hook(enter)
        yield block.register_forward_hook(leave)

    def _mark(self, what: Pass, stage: str = "", index: int = 0) -> None:
        self._close()
        tower = self.model.config.vision
        in_tower = self.shape.tiles * tower.crops * tower.num_tokens**2
        self.counter.pairs = in_tower if stage == "vision" else self.shape.pairs
        self.counter.reset_peak()
        self.segments.append(_Segment(what, stage, index, self.counter.live - self.start, self.counter.mark()))

    def _close(self) -> None:
        if self.segments:
            last = self.segments[-1]
            last.peak, last.ops = self.counter.peak - self.start, self.counter.since(last.mark)

    def ops(self, what: Pass, stage: str, index: int) -> Sequence[Op]:
        found = [s.ops for s in self.segments if (s.what, s.stage, s.index) == (what, stage, index)]
        return found[0] if found else ()

    def other_ops(self) -> Iterator[Op]:
        """Those that are in no layer."""
        return (op for s in self.segments if s.what not in ("forward", "backward") for op in s.ops)

    def _before(self, stage: str, index: int) -> int:
        return next(s.before for s in self.segments if (s.what, s.stage, s.index) == ("forward", stage, index))

    def _layers(self, stage: str, last: int, saved: int, below: int, behind: int) -> _Memory:
        """Of layers that are not the first of their stage, `last` being the index of the last one; above `below`, which
        was alive before the stage. behind: the most behind the stage, above what it keeps."""

        def most(what: Pass, *indices: int) -> int:
            found = [s for s in self.segments if s.stage == stage and s.what == what and s.index in indices]
            alive = [s.before if what == "forward" else below + s.index * saved for s in found]
            return max((s.peak - least for s, least in zip(found, alive, strict=True)), default=0)

        before = [self._before(stage, index) - below - index * saved for index in range(last + 1)]
        return _Memory(
            saved=saved, peak=max(most("backward", last), saved + behind), inner=most("backward", *range(1, last)),
            handed=max(before[1:]), forward=most("forward", *range(1, last + 1)), start=before[0],
        )  # fmt: skip

    def vision(self) -> _Memory:
        """Of a block of the tower."""
        ends = max(s.peak for s in self.segments if s.what in ("between", "behind"))
        if not self.shape.tiles:
            return _Memory(0, ends, ends, 0, 0, 0)
        tower, last = self.model.vision.config, self.num_vision - 1
        if tower.select_feature == "class_tokens":  # between taps: what they take is kept besides
            first, *_, fifth, _ = tower.taps
            saved = (self._before("vision", fifth) - self._before("vision", first)) // (fifth - first)
        else:
            saved = self._before("vision", last) - self._before("vision", last - 1)
        if not any(s.what == "backward" and s.stage == "vision" for s in self.segments):
            saved = 0  # frozen: what grows is the streams that image tokens are cut out of, however many blocks
        return self._layers("vision", last, saved, 0, ends - self.num_vision * saved)

    def language(self) -> _Memory:
        """Of a layer of the language model."""
        kept_by_tower = self.num_vision * self.vision().saved
        return self._layers("language", self.num_language - 1, self._saved(), kept_by_tower, self.after())

    def _saved(self) -> int:
        """What a layer of the language model keeps."""
        last = self.num_language - 1
        return self._before("language", last) - self._before("language", last - 1)

    def after(self) -> int:
        """The most that is alive in the head and the loss, above what all layers keep."""
        kept = self.num_vision * self.vision().saved + self.num_language * self._saved()
        return max(s.peak for s in self.segments if s.what == "after") - kept
