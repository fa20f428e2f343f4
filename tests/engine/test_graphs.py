"""Passes that are recorded and replayed give the bits of passes that are launched, whatever comes between."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from engine.data.padding import pad
from engine.distributed import Ranks
from engine.graphs import CudaRecorder, GraphedPasses, Passes, Scalars, run_pass, signature
from engine.optim import Optimizer
from engine.plan.meta_model import Bits, cut_down
from engine.scaler import LossScaler
from engine.step import StepResult, train_step
from kernels import attention, unpacked
from kernels.counting import counting
from models.linear import Linear
from models.pack import Pack, map_tensors
from models.recompute import ActivationPolicy
from models.vlm import VisionLanguageModel
from tests.engine.tape import HOST_READS, TapeRecorder
from tests.models.tiny import packs_of, random_samples, tiny_config, tiny_model

CPU = torch.device("cpu")
ALONE = Ranks(rank=0, local_rank=0, world=1)


@pytest.fixture(autouse=True)
def attention_that_asks_no_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int, causal: bool, scale: float) -> Tensor:
        assert longest >= int(bounds.detach().diff().numpy().max())  # no bound at all would be a wrong one on a GPU
        return attention.varlen_attention_reference(q, k, v, bounds, causal=causal, scale=scale)

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
    names = ("Stream", "MemPool", "CUDAGraph", "graph", "use_mem_pool")
    with mock.patch.multiple(torch.cuda, **dict.fromkeys(names, mock.DEFAULT)) as made:
        recorder = CudaRecorder(torch.device("cuda", 0))
        side, pool, graph = (made[name].return_value for name in ("Stream", "MemPool", "CUDAGraph"))
        with recorder.memory():
            assert not torch._C._is_multithreading_enabled()
        made["use_mem_pool"].assert_called_once_with(pool, recorder.device)
        work = mock.Mock(side_effect=made["graph"].return_value.__enter__.assert_called_once)
        assert recorder.record(work) is graph.replay
        made["graph"].assert_called_once_with(graph, pool=pool.id, stream=side, capture_error_mode="thread_local")
        inspect.signature(torch.cuda.graphs.graph).bind(graph, pool=pool.id, stream=side, capture_error_mode="")
    work.assert_called_once()
    assert torch._C._is_multithreading_enabled()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_graphs_on_a_gpu_give_the_losses_of_launches() -> None:
    device = torch.device("cuda", 0)

    def run(passes: Passes) -> list[StepResult]:
        run = Run(quantized().to(device), passes)
        run.device = device
        return [run.step(number, [pack.pin_memory() for pack in step_packs(number % 5)]) for number in range(20)]

    graphed = GraphedPasses(device, CudaRecorder(device))
    found, expected = run(graphed), run(Passes(device))
    assert graphed.replayed > graphed.launched
    for name in ("loss", "grad_norm"):
        assert [getattr(r, name) for r in found] == pytest.approx([getattr(r, name) for r in expected], rel=1e-3)
