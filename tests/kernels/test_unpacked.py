"""The buffer of unpacked weights: always the right values, and as few dequantisations as its size allows."""

from __future__ import annotations

import gc
import random
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from kernels import unpacked
from kernels.dequantize_nf4 import dequantize_nf4
from kernels.int8 import Int8Tensor, dequantize_int8
from kernels.linear_nf4 import linear_nf4
from kernels.nf4 import NF4Tensor, concatenate_nf4
from kernels.unpacked import Counters, Packed, configure, counters, forget, keep, release, weights
from tests.kernels.packed import int8, nf4

CPU = torch.device("cpu")
DTYPE = torch.float32
Group = tuple[Packed, ...]


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    release()
    configure()
    counters.__init__()
    yield
    release()
    configure()


def square(size: int = 64, device: torch.device = CPU) -> NF4Tensor:
    return nf4(size, size, DTYPE, device)


def group(rng: random.Random, device: torch.device) -> Group:
    columns = rng.choice([64, 72, 130])

    def one() -> Packed:
        rows = rng.randint(1, 40)
        kinds: list[Callable[[], Packed]] = [
            lambda: nf4(rows, columns, DTYPE, device),
            lambda: int8(rows, columns, DTYPE, device),
            lambda: concatenate_nf4([nf4(rows + i, columns, DTYPE, device) for i in range(rng.randint(1, 5))]),
        ]
        return rng.choice(kinds)()

    return tuple(one() for _ in range(rng.randint(1, 3)))


def assert_right(matrices: tuple[Tensor, ...], packed: Group, dtype: torch.dtype) -> None:
    for matrix, q in zip(matrices, packed, strict=True):
        right = dequantize_int8(q, dtype) if isinstance(q, Int8Tensor) else dequantize_nf4(q, dtype)
        assert torch.equal(matrix, right)


def write(packed: Group, rng: random.Random) -> None:
    """Other weights, in place, in one of a group's tensors."""
    q = rng.choice(packed)
    part: Any = q if isinstance(q, NF4Tensor | Int8Tensor) else rng.choice(q.parts)
    tensor = rng.choice([part.codes, part.scale if isinstance(part, Int8Tensor) else part.absmax2])
    tensor.copy_(tensor.flip(0))


@pytest.mark.parametrize("capacity", [0, 10_000, 100_000, 10**7])
@pytest.mark.parametrize("seed", range(3))
def test_any_sequence_has_the_right_values(capacity: int, seed: int, device: torch.device) -> None:
    torch.manual_seed(seed)
    rng = random.Random(seed)
    configure(scratch_bytes=capacity)
    groups = [group(rng, device) for _ in range(6)]
    for _ in range(60):
        event, i = rng.random(), rng.randrange(len(groups))
        if event < 0.1:
            write(groups[i], rng)
        elif event < 0.15:
            groups[i] = group(rng, device)  # maybe at the addresses of the old ones
        elif event < 0.2:
            rng.choice([forget, release])()
        elif event < 0.25:
            keep(groups[i], DTYPE)
        dtype = rng.choice([DTYPE, DTYPE, torch.bfloat16])
        assert_right(weights(groups[i], dtype), groups[i], dtype)
    assert counters.hits > (0 if capacity < 10**5 else 10)


def layers(count: int, linears: int) -> list[list[Group]]:
    return [[(square(),) for _ in range(linears)] for _ in range(count)]


def dequantisations(order: list[Group]) -> int:
    before = counters.dequantisations
    for packed in order:
        assert_right(weights(packed, DTYPE), packed, DTYPE)
    return counters.dequantisations - before


@pytest.mark.parametrize(("room", "each"), [(1, 7), (2, 6), (3, 5), (4, 4), (5, 4)])
def test_recomputation_and_backward_share_what_fits(room: int, each: int) -> None:
    """Four linears a layer: recomputed 1, 2, 3, 4, then differentiated 4, 3, 2, 1."""
    configure(scratch_bytes=room * 64 * 64 * DTYPE.itemsize)
    step = [packed for layer in reversed(layers(3, 4)) for packed in (*layer, *reversed(layer))]
    assert dequantisations(step) == 3 * each
    assert dequantisations(step) == 3 * each  # and in the next step


def test_checkpointed_layers_share(device: torch.device) -> None:
    """Through autograd, nothing left from the forward: recomputation unpacks each of 12 once, and the backward none."""
    configure(scratch_bytes=4 * 64 * 64 * DTYPE.itemsize)
    model = [[square(device=device) for _ in range(4)] for _ in range(3)]

    def run(layer: list[NF4Tensor], x: Tensor) -> Tensor:
        for q in layer:
            x = linear_nf4(x, q).tanh()
        return x

    x = torch.randn(70, 64, device=device, requires_grad=True)
    grads = []
    for recompute in (True, False):
        y = x
        for layer in model:
            y = checkpoint(run, layer, y, use_reentrant=False) if recompute else run(layer, y)
        forget()
        before = counters.dequantisations
        grads.append(torch.autograd.grad(y.sum(), x)[0])
        assert counters.dequantisations - before == 12
    assert torch.equal(*grads)


def test_the_memory_is_allocated_once() -> None:
    configure(scratch_bytes=3 * 64 * 64 * DTYPE.itemsize)
    storages = {weights(packed, DTYPE)[0].untyped_storage().data_ptr() for packed in layers(1, 10)[0]}
    assert len(storages) == 1
    small, large = (square(64),), (square(128),)
    release()
    configure()
    for packed in (small, large, small, large):
        assert_right(weights(packed, DTYPE), packed, DTYPE)
    (ring,) = unpacked._rings.values()
    assert ring.buffer.numel() == 128 * 128


def test_a_fused_weight_and_its_parts_are_one_group() -> None:
    parts = tuple(square() for _ in range(3))
    (whole,) = weights((concatenate_nf4(parts),), DTYPE)
    assert torch.equal(torch.cat(weights(parts, DTYPE)), whole)
    assert counters == Counters(hits=1, dequantisations=1)


def test_a_weight_that_is_written_is_unpacked_again() -> None:
    packed = (square(),)
    first = weights(packed, DTYPE)[0].clone()
    packed[0].offset.add_(1.0)
    second = weights(packed, DTYPE)[0]
    assert not torch.equal(first, second)
    assert_right((second,), packed, DTYPE)
    assert counters == Counters(dequantisations=2)


def test_another_weight_at_the_same_addresses_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a model was freed and the next one loaded: equal numbers of objects, memory and versions."""
    monkeypatch.setattr(unpacked, "id", lambda _: 0, raising=False)
    q = square()
    q = replace(q, codes=q.codes.clone())  # versions begin with 0
    first = weights((q,), DTYPE)[0].clone()
    other = replace(q, codes=q.codes.data)
    other.codes.data.copy_(other.codes.flip(0))
    assert (other.codes.data_ptr(), other.codes._version) == (q.codes.data_ptr(), q.codes._version)
    second = weights((other,), DTYPE)
    assert not torch.equal(first, second[0])
    assert_right(second, (other,), DTYPE)


@pytest.mark.parametrize("kept", [False, True])
def test_no_weight_is_kept_alive(kept: bool) -> None:
    configure(prefetch=True)
    q = square()
    if kept:
        keep((q,), DTYPE)
    weights((q,), DTYPE)
    references = [weakref.ref(q), weakref.ref(q.codes)]
    del q
    gc.collect()
    assert [reference() for reference in references] == [None, None]
    assert unpacked._kept == {}


def test_kept_copies_stay_and_follow_their_weights() -> None:
    packed = (square(), square())
    keep(packed, DTYPE)
    before = counters.dequantisations
    kept = weights(packed, DTYPE)
    dequantisations([(square(),) for _ in range(5)])
    assert_right(kept, packed, DTYPE)
    assert weights(packed, DTYPE)[0].data_ptr() == kept[0].data_ptr()
    assert counters.dequantisations == before + 5
    packed[1].codes.copy_(packed[0].codes)
    assert_right(weights(packed, DTYPE), packed, DTYPE)
    assert counters.dequantisations == before + 6
    forget()
    assert weights(packed, DTYPE)[0].data_ptr() == kept[0].data_ptr()
    release()
    assert weights(packed, DTYPE)[0].data_ptr() != kept[0].data_ptr()


def test_forget_unpacks_anew_in_the_same_memory() -> None:
    packed = (square(),)
    before = weights(packed, DTYPE)[0].data_ptr()
    forget()
    assert weights(packed, DTYPE)[0].data_ptr() == before
    assert counters == Counters(dequantisations=2)


def test_what_could_not_be_unpacked_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("no device")

    packed = (square(),)
    with monkeypatch.context() as patch:
        patch.setattr(unpacked, "unpack_nf4", fails)
        with pytest.raises(RuntimeError, match="no device"):
            weights(packed, DTYPE)
    assert_right(weights(packed, DTYPE), packed, DTYPE)


def test_in_and_out_of_inference_mode() -> None:
    one, other = (square(),), (square(),)
    for mode in (True, False, True):
        for packed in (one, other):
            with torch.inference_mode(mode):
                assert_right(weights(packed, DTYPE), packed, DTYPE)
    x = torch.randn(70, 64, requires_grad=True)
    linear_nf4(x, one[0]).sum().backward()
    with torch.inference_mode():
        inside = (square(),)
        assert_right(weights(inside, DTYPE), inside, DTYPE)


def test_fake_tensors_leave_no_trace() -> None:
    """Whoever asks for shapes alone: real weights that were never unpacked are not there afterwards."""
    first, second, x = square(), square(), torch.randn(70, 64)
    for q in (first, second):  # without a buffer, and with one
        with FakeTensorMode(allow_non_fake_inputs=True):
            assert linear_nf4(torch.empty(70, 64), q).shape == (70, 64)
        assert torch.equal(linear_nf4(x, q), x @ dequantize_nf4(q).T)


class Delayed:
    """A second stream at its slowest: what it is given is done when somebody waits for it, and not before."""

    def __init__(self) -> None:
        self.work: list[Callable[[], None]] = []

    def run(self, work: Callable[[], None]) -> Delayed.Event:
        self.work.append(work)
        return Delayed.Event(self, len(self.work))

    class Event:
        def __init__(self, stream: Delayed, until: int) -> None:
            self.stream, self.until = stream, until

        def wait(self) -> None:
            for i in range(self.until):
                self.stream.work[i]()
                self.stream.work[i] = lambda: None


class AtOnce:
    """At its fastest: all is done before the product that it runs beside has read anything."""

    def run(self, work: Callable[[], None]) -> AtOnce:
        work()
        return self

    def wait(self) -> None:
        pass


@pytest.fixture(params=[Delayed, AtOnce])
def second_stream(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = request.param()
    monkeypatch.setattr(unpacked, "_second_stream", lambda device: stream)


@pytest.mark.usefixtures("second_stream")
@pytest.mark.parametrize("room", [2, 3, 5])
def test_a_chain_is_unpacked_ahead(room: int) -> None:
    chain = layers(1, 8)[0]
    configure(scratch_bytes=room * 64 * 64 * DTYPE.itemsize, prefetch=True)
    dequantisations(chain)
    assert counters.prefetched == 0
    forget()
    assert dequantisations(chain) == 8  # none twice
    assert counters.prefetched == 7


@pytest.mark.usefixtures("second_stream")
def test_without_room_nothing_is_unpacked_ahead() -> None:
    chain = layers(1, 8)[0]
    configure(scratch_bytes=64 * 64 * DTYPE.itemsize * 3 // 2, prefetch=True)
    assert dequantisations(chain) + dequantisations(chain) == 16
    assert counters.prefetched == 0


@pytest.mark.usefixtures("second_stream")
def test_directions_are_told_apart() -> None:
    """Forward 1..6, backward 6..1, with room for two: two are still there at each turn, all others come ahead."""
    chain = layers(1, 6)[0]
    configure(scratch_bytes=2 * 64 * 64 * DTYPE.itemsize, prefetch=True)
    step = [*chain, *reversed(chain)]
    for _ in range(3):
        counters.__init__()
        needed = dequantisations(step)
    assert (needed, counters.prefetched) == (8, 8)


@pytest.mark.usefixtures("second_stream")
@pytest.mark.parametrize("seed", range(6))
def test_prefetching_changes_no_value(seed: int, device: torch.device) -> None:
    torch.manual_seed(seed)
    rng = random.Random(seed)
    groups = [group(rng, device) for _ in range(7)]
    configure(scratch_bytes=rng.choice([20_000, 60_000, 150_000]), prefetch=True)
    for _ in range(8):
        order = list(range(7)) if rng.random() < 0.8 else rng.sample(range(7), 7)
        for i in (*order, *reversed(order)):
            event = rng.random()
            if event < 0.05:
                write(groups[i], rng)
            elif event < 0.1:
                groups[i] = group(rng, device)
            elif event < 0.13:
                forget()
            assert_right(weights(groups[i], DTYPE), groups[i], DTYPE)
    assert counters.prefetched > 5


@pytest.mark.usefixtures("second_stream")
def test_weights_that_are_not_there_are_not_unpacked_ahead() -> None:
    """FSDP2 frees the memory of a layer's weights under their tensors until it gathers them for the next use."""
    chain = layers(1, 3)[0]
    configure(scratch_bytes=2 * 64 * 64 * DTYPE.itemsize, prefetch=True)
    dequantisations(chain)
    forget()
    absent = chain[1][0].codes  # type: ignore[union-attr]
    saved = absent.clone()
    absent.untyped_storage().resize_(0)
    dequantisations(chain[:1])
    assert counters.prefetched == 0
    absent.untyped_storage().resize_(saved.nbytes)
    absent.copy_(saved)
    dequantisations(chain[1:])
    assert counters.prefetched == 1


def test_what_was_prefetched_is_waited_for_where_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the stream that asked for it, whatever the current one and its device: another stream's buffer is given back,
    too."""
    waiting: list[object] = []
    event = SimpleNamespace(wait=waiting.append)
    device = torch.device("cuda", 1)
    stream = SimpleNamespace(device=device, wait_stream=lambda stream: None, record_event=lambda: event)
    current = {"stream": "reader"}
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"{current['stream']} on {device}")
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream)
    ready = unpacked._CudaStream(device).run(lambda: None)
    current["stream"] = "another"
    ready.wait()
    assert waiting == ["reader on cuda:1"]


@pytest.mark.parametrize("give_back", ["forget", "release", "grow"])
def test_nothing_is_written_to_memory_that_is_given_back(give_back: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Delayed()
    monkeypatch.setattr(unpacked, "_second_stream", lambda device: stream)
    chain = layers(1, 4)[0]
    configure(scratch_bytes=2 * 64 * 64 * DTYPE.itemsize, prefetch=True)
    dequantisations(chain)
    forget()
    weights(chain[0], DTYPE)
    (matrix,) = (group.matrix for group in unpacked._rings[CPU, DTYPE, 0, False].groups.values() if group.ready)
    assert not torch.equal(matrix, expected := dequantize_nf4(chain[1][0]).to(DTYPE))  # type: ignore[arg-type]
    if give_back == "grow":
        weights((square(128),), DTYPE)
    else:
        {"forget": lambda: forget(memory=True), "release": release}[give_back]()
    assert torch.equal(matrix, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_prefetching_on_a_device_that_is_not_the_current_one() -> None:
    device, dtype = torch.device("cuda", 1), torch.bfloat16
    chain = [nf4(2048, 2048, dtype, device) for _ in range(6)]
    configure(scratch_bytes=3 * 2048 * 2048 * dtype.itemsize, prefetch=True)
    x = torch.randn(128, 2048, device=device, dtype=dtype)
    for _ in range(20):
        for q in chain:
            assert torch.equal(linear_nf4(x, q), x @ dequantize_nf4(q).T)
    assert counters.prefetched > 50


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_prefetching_on_a_second_stream_changes_no_bit() -> None:
    """Products long enough that a wrong order would show."""
    device, dtype = torch.device("cuda"), torch.bfloat16
    torch.manual_seed(0)
    chain = [nf4(2048, 2048, dtype, device) for _ in range(6)]
    x = torch.randn(2048, 2048, device=device, dtype=dtype, requires_grad=True)

    def step() -> list[Tensor]:
        y, ys = x, []
        for q in chain:
            y = linear_nf4(y, q)
            ys.append(y)
        return [*ys, torch.autograd.grad(y.sum(), x)[0]]

    right = step()
    for room in (1, 2, 3, 7):
        configure(scratch_bytes=room * 2048 * 2048 * dtype.itemsize, prefetch=True)
        for _ in range(20):
            assert all(torch.equal(a, b) for a, b in zip(step(), right, strict=True))
    assert counters.prefetched > 100


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("room", "prefetch"), [(1, False), (2, True), (3, True)])
def test_a_graph_has_a_buffer_of_its_own(room: int, prefetch: bool) -> None:
    """Replays write into it; what is unpacked outside stays right, and so do the replays."""
    device, dtype = torch.device("cuda"), torch.bfloat16
    chain = [nf4(256, 256, dtype, device) for _ in range(3)]
    x = torch.randn(100, 256, device=device, dtype=dtype)

    def forward() -> Tensor:
        y = x
        for q in chain:
            y = linear_nf4(y, q)
        return y

    configure(scratch_bytes=room * 256 * 256 * dtype.itemsize, prefetch=prefetch)
    for _ in range(2):
        right = forward()
        forget()
    torch.cuda.synchronize()
    before = counters.prefetched
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = forward()
        forget()
    assert counters.prefetched - before == (2 if prefetch else 0)
    for _ in range(3):
        y.zero_()
        (outside,) = weights((chain[0],), dtype)
        graph.replay()
        assert torch.equal(y, right)
        assert_right((outside,), (chain[0],), dtype)
        assert torch.equal(forward(), right)
