"""Passes that are recorded and replayed give the bits of passes that are launched, whatever comes between."""

from __future__ import annotations

import gc
import inspect
import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from engine.data.packing import collate, token_weights
from engine.data.padding import pad
from engine.data.planning import plan_packs
from engine.distributed import Ranks
from engine.graphs import CudaRecorder, GraphedPasses, Passes, Recorder, Scalars, run_pass, signature
from engine.optim import Optimizer
from engine.plan.meta_model import Bits, cut_down
from engine.scaler import LossScaler
from engine.step import StepResult, train_step
from engine.tower_cache import FeatureTable, TowerCache
from kernels import attention, unpacked
from kernels.counting import counting
from models.linear import Linear, pack_of
from models.pack import Pack, map_tensors
from models.recompute import POLICIES, ActivationPolicy, Policy
from models.vlm import VisionLanguageModel
from tests.engine.tape import HOST_READS, TapeRecorder
from tests.models.tiny import packs_of, random_samples, tiny_config, tiny_model

CPU = torch.device("cpu")
ALONE = Ranks(rank=0, local_rank=0, world=1)


@pytest.fixture(autouse=True)
def attention_that_asks_no_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    def attend(
        q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int, causal: bool, scale: float, window: int | None
    ) -> Tensor:
        assert longest >= int(bounds.detach().diff().numpy().max())  # no bound at all would be a wrong one on a GPU
        return attention.varlen_attention_reference(q, k, v, bounds, causal=causal, scale=scale, window=window)

    monkeypatch.setitem(attention.IMPLEMENTATIONS, "sdpa", attend)


def quantized(seed: int = 0) -> VisionLanguageModel:
    """A model with packed weights, frozen but for adapters and projector, in training."""
    model = tiny_model(tiny_config(num_layers=2, language_placement="block"), seed)
    for name, module in model.language.layers.named_modules():
        if isinstance(module, Linear) and module.weight is not None:
            module.quantize(module.weight.detach(), bits=4, device=CPU, name=name)
    return model.train()


def step_packs(step: int) -> list[Pack]:
    """Packs of 128 or 256 tokens, with up to two images or none."""
    layout = [(20 + 7 * ((3 * step + i) % 9), (step + i) % (2 + step % 3) == 0) for i in range(3 + step % 3)]
    samples, tiles = random_samples(layout, seed=step)
    return [pad(pack) for _, pack in packs_of(samples, tiles, tokens_per_batch=256 if step % 4 == 3 else 128)]


class Run:
    """A model, its optimiser and how its passes are launched."""

    def __init__(self, model: nn.Module, passes: Passes, *, fp16: bool = False) -> None:
        self.model, self.passes, self.device = model, passes, CPU
        self.optimizer = Optimizer(model.named_parameters(), weight_decay=0.02)
        self.scaler = LossScaler(enabled=fp16)

    def step(self, number: int, packs: list[Pack]) -> StepResult:
        return train_step(
            self.model, packs, self.optimizer, self.scaler, ALONE, step=number, seed=5, lr=1e-2, clip_grad=1.0,
            device=self.device, counts=(number, 3), passes=self.passes,
        )  # fmt: skip


def assert_same(a: Run, b: Run) -> None:
    for one, other in zip(a.optimizer.flats, b.optimizer.flats, strict=True):
        for name in ("param", "grad", "exp_avg", "exp_avg_sq", "step"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name


def both(**options: int) -> tuple[Run, Run, GraphedPasses]:
    graphed = GraphedPasses(CPU, TapeRecorder(), **options)
    return Run(quantized(), Passes(CPU)), Run(quantized(), graphed), graphed


def test_replays_give_the_bits_of_launches_while_shapes_change() -> None:
    launched, replayed, graphed = both()
    seen = set[object]()
    losses = []
    for number in range(10):
        packs = step_packs(number)
        seen |= {signature(pack) for pack in packs}
        expected = launched.step(number, step_packs(number))
        assert replayed.step(number, packs) == expected
        assert_same(launched, replayed)
        losses.append(expected.loss)
    assert len(set(losses)) == len(losses)  # every step is another one
    assert 2 < len(seen) <= graphed.launched and graphed.replayed >= 8


def test_an_overflow_is_repeated_by_replays() -> None:
    launched, replayed, graphed = both()
    packs = step_packs(1)
    for run in (launched, replayed):
        run.scaler = LossScaler(enabled=True)
        weight = next(p for p in run.optimizer.named.values() if p.ndim == 2)
        weight.register_hook(lambda grad: torch.where(grad.abs() < 100.0, grad, torch.inf))
    for number in range(3):
        assert replayed.step(number, packs) == launched.step(number, packs)
        assert replayed.scaler == launched.scaler
        assert_same(launched, replayed)
    assert replayed.scaler.scale < 65536 and graphed.replayed > graphed.launched


@pytest.fixture
def one_pack() -> Iterator[Pack]:
    samples, tiles = random_samples([(30, True), (40, False)])
    yield pad(packs_of(samples, tiles)[0][1])


def test_each_value_that_the_host_gives_a_pass_is_in_the_signature(one_pack: Pack) -> None:
    others = [
        replace(one_pack, segments=replace(one_pack.segments, max_seqlen=1024)),
        replace(one_pack, segments=replace(one_pack.segments, cu_seqlens=one_pack.segments.cu_seqlens.repeat(2)[:-16])),
        replace(one_pack, tiles=None),
        replace(one_pack, weights=one_pack.weights.repeat(2)),
        replace(one_pack, image_slots=one_pack.image_slots[:6]),
    ]
    assert len({signature(pack) for pack in (one_pack, *others)}) == 6
    assert signature(one_pack) == signature(replace(one_pack, num_samples=7, weights=2 * one_pack.weights))


def test_only_so_many_are_captured_and_what_cannot_be_is_launched() -> None:
    launched, replayed, graphed = both(most=1)
    for number in range(6):
        packs = [step_packs(0)[0], replace(step_packs(0)[0], tiles=None, image_slots=torch.zeros(0, dtype=torch.int64))]
        assert signature(packs[0]) != signature(packs[1])
        assert replayed.step(number, packs) == launched.step(number, packs)
    assert (graphed.launched, graphed.replayed) == (7, 5)


def test_a_host_read_ends_captures_with_a_warning(one_pack: Pack, caplog: pytest.LogCaptureFixture) -> None:
    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2, 2))

        def forward(self, pack: Pack, seed: Tensor) -> Tensor:
            return self.weight.sum() * pack.weights.sum().item()

    graphed = GraphedPasses(CPU, TapeRecorder())
    run, plain = Run(Asks(), graphed), Run(Asks(), Passes(CPU))
    with caplog.at_level(logging.WARNING, "nibble"):
        for number in range(4):
            assert run.step(number, [one_pack]) == plain.step(number, [one_pack])
    assert (graphed.launched, graphed.replayed) == (4, 0)
    assert [r.getMessage() for r in caplog.records] == [
        "no CUDA graphs from here on: a capture failed: RuntimeError: the host reads a tensor in a capture"
    ]


def test_attention_that_waits_is_never_captured(one_pack: Pack, caplog: pytest.LogCaptureFixture) -> None:
    graphed = GraphedPasses(CPU, TapeRecorder("attention is sdpa"))
    run = Run(quantized(), graphed)
    with caplog.at_level(logging.WARNING, "nibble"):
        for number in range(3):
            run.step(number, [one_pack])
    assert (graphed.launched, graphed.replayed) == (3, 0)
    assert [r.getMessage() for r in caplog.records] == ["no CUDA graphs from here on: attention is sdpa"]


class Waits(TorchDispatchMode):
    """Notes what asks a device for values."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in HOST_READS:
            self.seen.append(str(func))
        return func(*args, **kwargs or {})

    def tolist(self, tensor: Tensor) -> Any:
        self.seen.append("tolist")
        return tensor.detach().numpy().tolist()


@pytest.mark.parametrize("replays", [False, True])
def test_a_step_waits_once(replays: bool) -> None:
    run = both()[1 if replays else 0]
    for number in range(3):  # every shape is captured
        run.step(number, step_packs(1))
    waits, packs = Waits(), step_packs(1)
    with mock.patch.object(Tensor, "tolist", lambda tensor: waits.tolist(tensor)), waits:  # noqa: PLW0108
        run.step(3, packs)
    assert waits.seen == ["tolist"]
    assert not replays or (isinstance(run.passes, GraphedPasses) and run.passes.replayed >= 2)


@pytest.mark.parametrize("policy", ["save_all", "recompute_mlp", "keep_input"])
def test_a_pass_as_a_card_runs_it_asks_for_no_value(policy: Any, one_pack: Pack) -> None:
    """On the meta device there is none: the host would fail where it asked. Attention is Triton's."""
    meta = torch.device("meta")
    model = cut_down(tiny_config(drop_path=0.1), Bits(layers=4, head=8, vision=4), torch.bfloat16)
    model.use_activation_policy(ActivationPolicy.uniform(policy, 3, 6))
    pack = map_tensors(one_pack, lambda tensor: tensor.to(meta))
    assert pack.tiles is not None
    with unpacked.apart(1 << 20, torch.bfloat16, meta), counting() as counter:
        run_pass(model, pack, Scalars.zeros(meta))
    assert sum(op.launches for op in counter.ops) > 300


def test_a_capture_shares_stream_and_memory_with_what_is_launched() -> None:
    """What torch is asked for; that it works is for a GPU."""
    names = ("Stream", "MemPool", "CUDAGraph", "graph", "use_mem_pool", "empty_cache")
    with mock.patch.multiple(torch.cuda, **dict.fromkeys(names, mock.DEFAULT)) as made:
        recorder = CudaRecorder(torch.device("cuda", 0))
        side, pool, graph = (made[name].return_value for name in ("Stream", "MemPool", "CUDAGraph"))
        with recorder.memory():
            assert not torch._C._is_multithreading_enabled()
            made["empty_cache"].assert_called_once()
        made["use_mem_pool"].assert_called_once_with(pool, recorder.device)
        work = mock.Mock(side_effect=made["graph"].return_value.__enter__.assert_called_once)
        assert recorder.record(work) is graph.replay
        made["graph"].assert_called_once_with(graph, pool=pool.id, stream=side, capture_error_mode="thread_local")
        inspect.signature(torch.cuda.graphs.graph).bind(graph, pool=pool.id, stream=side, capture_error_mode="")
        pool.snapshot.return_value = [{"allocated_size": 3}, {"allocated_size": 4}]
        assert recorder.held() == 7
        with mock.patch.object(torch.cuda, "synchronize") as waits:
            recorder.release(mock.Mock(side_effect=lambda: (waits.assert_called_once(), made["MemPool"].reset_mock())))
            made["MemPool"].assert_called_once_with()  # after the graphs
    work.assert_called_once()
    assert torch._C._is_multithreading_enabled()


@pytest.mark.parametrize("ended", [False, True])
def test_the_allocator_leaves_a_capture_that_cuda_does_not_end(ended: bool) -> None:
    """torch.cuda.graph's exit raises where cudaStreamEndCapture does, before it tells the allocator."""
    names = ("Stream", "MemPool", "CUDAGraph", "graph", "current_device")
    told = []

    def end(device: object, pool: object) -> None:
        if ended:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        told.append("end")

    with (
        mock.patch.multiple(torch.cuda, **dict.fromkeys(names, mock.DEFAULT)) as made,
        mock.patch.object(torch._C, "_cuda_endAllocateToPool", end),
        mock.patch.object(torch._C, "_cuda_releasePool", lambda device, pool: told.append("release")),
    ):
        made["graph"].return_value.__exit__.side_effect = RuntimeError("capture invalidated")
        with pytest.raises(RuntimeError, match="capture invalidated"):
            CudaRecorder(torch.device("cuda", 0)).record(lambda: None)
    assert told == ([] if ended else ["end", "release"])
    assert torch._C._is_multithreading_enabled()


def test_what_a_pass_leaves_behind_is_not_written_over() -> None:
    """It may lie where graphs write that were there before: those are captured again."""
    launched, replayed, graphed = both()
    recorder = graphed.recorder
    assert isinstance(recorder, TapeRecorder)
    small, large = step_packs(0), step_packs(7)
    assert signature(small[0]) != signature(large[0])
    for number, (packs, left) in enumerate([(small, 5), (small, 5), (small, 5), (large, 9), (small, 0), (large, 0)]):
        recorder.left = left
        assert replayed.step(number, packs) == launched.step(number, packs)
        assert_same(launched, replayed)
    assert recorder.released == 1
    assert (graphed.launched, graphed.replayed) == (2, 4)


def test_a_step_that_finds_no_memory_is_repeated_once(caplog: pytest.LogCaptureFixture) -> None:
    launched, replayed, graphed = both()
    assert isinstance(graphed.recorder, TapeRecorder)
    missing = {"passes": 0}

    def fails(grad: Tensor) -> Tensor:  # in the middle of a backward pass
        if missing["passes"]:
            missing["passes"] -= 1
            raise torch.OutOfMemoryError("CUDA out of memory")
        return grad

    weight = next(p for p in replayed.optimizer.named.values() if p.ndim == 2)
    weight.register_hook(fails)
    for number, packs in enumerate(map(step_packs, (1, 1, 7, 7, 1))):
        missing["passes"] = int(number == 2)
        assert replayed.step(number, packs) == launched.step(number, packs)
        assert_same(launched, replayed)
    assert graphed.recorder.released == 1 and (graphed.launched, graphed.replayed) == (3, 5)
    assert ["step 2: no memory" in r.getMessage() for r in caplog.records if r.levelno == logging.WARNING] == [True]
    missing["passes"] = 2
    with pytest.raises(torch.OutOfMemoryError):
        replayed.step(5, [replace(step_packs(7)[0], tiles=None, image_slots=torch.zeros(0, dtype=torch.int64))])
    plain = Run(quantized(), Passes(CPU))
    next(p for p in plain.optimizer.named.values() if p.ndim == 2).register_hook(fails)
    missing["passes"] = 1
    with pytest.raises(torch.OutOfMemoryError):  # nothing would be won
        plain.step(0, step_packs(0))


def test_copies_of_weights_are_given_up_before_a_run_ends_for_want_of_memory() -> None:
    launched, replayed, _ = both()
    assert isinstance(replayed.model, VisionLanguageModel)
    block = replayed.model.language.blocks()[0]
    for group in block.groups():
        unpacked.keep(pack_of(group), torch.float32)
    assert unpacked.kept_bytes() > 0
    missing = {"passes": 0}

    def fails(grad: Tensor) -> Tensor:
        if missing["passes"]:
            missing["passes"] -= 1
            raise torch.OutOfMemoryError("CUDA out of memory")
        return grad

    next(p for p in replayed.optimizer.named.values() if p.ndim == 2).register_hook(fails)
    for number, packs in enumerate(map(step_packs, (1, 1, 7, 1))):
        missing["passes"] = 2 if number == 2 else 0  # without graphs too
        assert replayed.step(number, packs) == launched.step(number, packs)
        assert_same(launched, replayed)
        assert (unpacked.kept_bytes() == 0) == (number >= 2)


def test_one_of_several_ranks_repeats_nothing() -> None:
    """The others would wait for its part of the exchange, or take the second part for another's."""
    run = Run(quantized(), Passes(CPU))
    assert isinstance(run.model, VisionLanguageModel)
    unpacked.keep(pack_of(run.model.language.blocks()[0].groups()[0]), torch.float32)

    def fails(grad: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    next(p for p in run.optimizer.named.values() if p.ndim == 2).register_hook(fails)
    with pytest.raises(torch.OutOfMemoryError):
        train_step(
            run.model, step_packs(0), run.optimizer, run.scaler, Ranks(0, 0, 2), step=0, seed=5, lr=1e-2, clip_grad=1.0,
            device=CPU, passes=run.passes,
        )  # fmt: skip
    assert unpacked.kept_bytes() > 0


@pytest.mark.parametrize("policy", POLICIES)
def test_a_pass_leaves_no_tensor_behind(policy: Policy) -> None:
    """Not even to the garbage collector: its memory is the next pass's."""
    model, scalars = quantized(), Scalars.zeros(CPU)
    model.use_activation_policy(ActivationPolicy.uniform(policy, 2, 6))
    Optimizer(model.named_parameters(), weight_decay=0.0)

    def storages() -> set[int]:
        tensors = [o for o in gc.get_objects() if type(o) in (Tensor, nn.Parameter)]  # not those that tests faked
        dense = [t for t in tensors if t.layout is torch.strided and t.device == CPU]
        return {t.untyped_storage()._cdata for t in dense}  # a pointer that fakes have too

    gc.collect()
    gc.disable()
    try:
        (first, *_) = step_packs(0)
        run_pass(model, first, scalars)
        unpacked.forget(memory=True)
        before = storages()
        run_pass(model, first, scalars)
        unpacked.forget(memory=True)
        assert storages() == before
    finally:
        gc.enable()


@dataclass(frozen=True)
class Case:
    """What a run may be made of."""

    policy: Policy
    bits: int
    frozen_tower: bool = False
    padded: bool = True
    prefetch: bool = False


CASES = [
    Case("save_all", 4),
    Case("recompute_mlp", 4, prefetch=True),
    Case("keep_input", 4, frozen_tower=True),
    Case("keep_input", 8, prefetch=True),
    Case("recompute_mlp", 8, frozen_tower=True, padded=False),
    Case("save_all", 16, padded=False),
    Case("keep_input", 16, frozen_tower=True),
]


def model_of(case: Case, device: torch.device, dtype: torch.dtype) -> VisionLanguageModel:
    """In training; what is frozen in `dtype` or packed, what learns in fp32."""
    vision: Any = "frozen" if case.frozen_tower else "mma"
    model = tiny_model(tiny_config(num_layers=2, drop_path=0.1, train_vision=vision))
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    for name, module in model.named_modules():
        packed = isinstance(module, Linear) and module.weight is not None and not module.trains_weight
        if packed and case.bits < 16 and name.startswith(("language.layers", "vision.layers")):
            module.quantize(module.weight.detach(), bits=case.bits, device=CPU, name=name)
    model.use_activation_policy(ActivationPolicy.uniform(case.policy, 2, 6))
    return model.to(device).train()


def packs_with_features(number: int, case: Case, places: FeatureTable | None) -> list[Pack]:
    """A step's packs as the loader makes them, of 128 or 256 tokens, with images or none. Shapes are those of six steps
    before, and images have the names of two steps before."""
    layout = [(20 + 7 * ((3 * number + i) % 9), i < 2) for i in range(6)]
    samples, tiles = random_samples(layout, seed=number % 2)
    made = []
    for members in plan_packs([length for length, _ in layout], 256 if number % 3 == 2 else 128):
        mine, rows = [tiles[i] for i in members], None
        if places is not None:
            found = [(0, False) if tiles[i] is None else places.place(f"{number % 2}-{i}") for i in members]
            mine = [tile if new else None for tile, (_, new) in zip(mine, found, strict=True)]
            rows = [row or 0 for row, _ in found]
        weights = token_weights([samples[i] for i in members], "sample")
        pack = collate([samples[i] for i in members], weights, mine, table_rows=rows)
        made.append(pad(pack) if case.padded else pack)
    return made


class Side:
    """One of two runs over the same packs, whose gradients are looked at before they are used."""

    def __init__(self, case: Case, device: torch.device, dtype: torch.dtype, recorder: Recorder | None) -> None:
        self.model, self.case = model_of(case, device, dtype), case
        tower = TowerCache(self.model.vision, device, images=99, most_new=8) if case.frozen_tower else None
        self.passes = Passes(device, tower) if recorder is None else GraphedPasses(device, recorder, tower)
        self.optimizer = Optimizer(self.model.named_parameters(), weight_decay=0.02)
        self.held: list[Pack] = []

    def step(self, number: int, learn: bool = True) -> tuple[Tensor, ...]:
        """Loss and gradients, on the CPU."""
        self.held = packs_with_features(number, self.case, self.passes.places)
        if self.passes.device.type == "cuda":
            self.held = [pack.pin_memory() for pack in self.held]
        scalars = self.passes.scalars
        with self.passes.stream():
            scalars.loss.zero_()
            scalars.scale.fill_(2.0)
            for place, pack in enumerate(self.held):
                scalars.seed.fill_(100 * number + place)
                self.passes.run(self.model, pack)
        found = (scalars.loss.cpu(), *(flat.grad.cpu() for flat in self.optimizer.flats))  # on the outer stream
        with self.passes.stream():
            if learn:
                self.optimizer.step(1e-3, scale=2.0, clip_grad=1.0)
            else:
                self.optimizer.zero_grad()
        return found

    @torch.no_grad()
    def evaluate(self) -> float:
        """Between steps, on the outer stream, as validation does it."""
        pack = packs_with_features(1, replace(self.case, padded=False), None)[0]
        self.model.eval()
        loss: float = self.model(pack.to(self.passes.device)).item()
        self.model.train()
        return loss


@pytest.mark.parametrize("case", CASES, ids=str)
def test_each_kind_of_run_has_the_gradients_of_launches(case: Case) -> None:
    plain = Side(case, CPU, torch.float32, None)
    graphed = Side(case, CPU, torch.float32, TapeRecorder())
    for number in range(6):
        for expected, found in zip(plain.step(number), graphed.step(number), strict=True):
            assert torch.equal(expected, found)
        assert graphed.evaluate() == plain.evaluate()
    passes = graphed.passes
    assert isinstance(passes, GraphedPasses) and not passes._off
    assert passes.launched == len(passes._met) and passes.replayed >= 4


@pytest.fixture
def own_memory() -> Iterator[None]:
    yield
    unpacked.release()
    unpacked.configure()


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@gpu
@pytest.mark.usefixtures("own_memory")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_on_a_gpu_graphs_have_the_gradients_of_launches(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """16-bit products and atomics: not the same bits, but two runs of launches differ as much (`noise`)."""
    monkeypatch.undo()  # attention as it is
    device = torch.device("cuda", 0)
    unpacked.configure(scratch_bytes=1 << 16, prefetch=case.prefetch)
    recorder = CudaRecorder(device)
    plain, again = (Side(case, device, torch.bfloat16, None) for _ in range(2))
    graphed = Side(case, device, torch.bfloat16, recorder)
    passes = graphed.passes
    assert isinstance(passes, GraphedPasses)
    sizes, held = [], []
    for number in range(24):
        states = [side.model.state_dict() for side in (plain, again, graphed)]
        for name, tensor in states[0].items():  # each step starts from the same weights
            states[1][name].copy_(tensor)
            states[2][name].copy_(tensor)
        expected, noise, found = (side.step(number) for side in (plain, again, graphed))
        for i, (a, b, c) in enumerate(zip(expected, noise, found, strict=True)):
            limit = 4 * float((a - b).norm()) + 1e-2 * float(a.norm())
            assert torch.isfinite(c).all() and float((a - c).norm()) <= limit, (number, i)
        assert graphed.evaluate() == pytest.approx(plain.evaluate(), rel=1e-2)
        held.append(recorder.held())
        sizes.append(torch.cuda.memory_reserved(device))
    assert not passes._off and passes.replayed > passes.launched
    assert passes.launched == len(passes._met) == len(passes._graphs)  # none was captured twice
    assert len(set(held[6:])) == 1  # shapes come again after 6 steps: captures leave nothing
    assert len(set(sizes[18:])) == 1
    graphs = len(passes._graphs)
    passes.release()
    assert recorder.held() == 0 and not passes._graphs
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved(device) <= sizes[-1]
    for number in range(4):  # captured again at once
        assert torch.isfinite(graphed.step(number, learn=False)[0])
    assert len(passes._graphs) <= graphs and not passes._off


@gpu
@pytest.mark.usefixtures("own_memory")
def test_on_a_gpu_a_step_is_a_few_launches_and_one_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    device = torch.device("cuda", 0)
    passes = GraphedPasses(device, CudaRecorder(device))
    run = Run(model_of(CASES[0], device, torch.bfloat16), passes)
    run.device = device
    for number in range(4):
        run.step(number, [pack.pin_memory() for pack in step_packs(1)])
    packs = [pack.pin_memory() for pack in step_packs(1)]
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        run.step(4, packs)
    calls = Counter(event.key for event in profile.events())

    def count(*parts: str) -> int:
        return sum(n for name, n in calls.items() if name.startswith(("cuda", "cu")) and any(p in name for p in parts))

    assert count("GraphLaunch") == len(packs)
    assert count("LaunchKernel") <= 40  # fills of seeds and scalars, the update
    assert count("StreamSynchronize", "EventSynchronize") <= 2, calls  # that of tolist
    assert count("Malloc", "HostAlloc") == 0


@gpu
def test_on_a_gpu_a_failed_capture_leaves_training_and_memory_whole(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Asking the device inside a capture invalidates it: the end of the capture fails, too."""
    monkeypatch.undo()
    device = torch.device("cuda", 0)

    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(512, 512))

        def forward(self, pack: Pack, seed: Tensor) -> Tensor:
            return (self.weight @ self.weight).mean() * pack.weights.sum().item()

    packs = [pack.pin_memory() for pack in step_packs(0)[:1]]
    graphed = GraphedPasses(device, CudaRecorder(device))
    runs = [Run(Asks().to(device), passes) for passes in (graphed, Passes(device))]
    with caplog.at_level(logging.WARNING, "nibble"):
        for number in range(4):
            found, expected = (run.step(number, packs) for run in runs)
            assert found.loss == pytest.approx(expected.loss, rel=1e-4)
    assert (graphed.launched, graphed.replayed) == (4, 0)
    assert "a capture failed" in caplog.text
    torch.cuda.empty_cache()
    other = torch.cuda.Stream(device)
    block = torch.empty(64 << 20, dtype=torch.uint8, device=device)
    place = block.data_ptr()
    block.record_stream(other)
    del block
    torch.cuda.synchronize()
    assert torch.empty(64 << 20, dtype=torch.uint8, device=device).data_ptr() == place  # not kept for a capture's end


@gpu
def test_on_a_gpu_memory_of_two_shapes_is_that_of_the_larger(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pool and captures share; what is left over for all graphs is little beside one pass."""
    monkeypatch.undo()
    device = torch.device("cuda", 0)

    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.full((256, 1), 0.01))

        def forward(self, pack: Pack, seed: Tensor) -> Tensor:
            x = pack.input_ids.float().repeat(64)[:, None] * self.weight.T  # [64 T, 256]: 8 or 16 MiB
            return torch.tanh(torch.tanh(torch.tanh(x))).mean() * pack.weights.sum()

    long, short = step_packs(7)[0], step_packs(0)[0]
    assert long.input_ids.numel() == 2 * short.input_ids.numel()

    def peak(*packs: Pack) -> int:
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved(device)
        run = Run(Wide().to(device), GraphedPasses(device, CudaRecorder(device)))
        for number in range(4):
            run.step(number, [pack.pin_memory() for pack in packs])
        return torch.cuda.memory_reserved(device) - before

    alone = peak(long)
    assert peak(long, short) <= 1.25 * alone
    assert alone <= 10 * (16 << 20)
