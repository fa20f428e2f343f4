from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from engine.data.image_processor import ImageProcessor
from engine.data.images import TileReader
from engine.data.loader import StepLoader
from engine.data.sample import IGNORE, Sample
from engine.data.sampler import StepSampler
from engine.errors import DataError
from models.pack import Pack

SIZE = 4
STEP = 8


class Numbers:
    """Samples whose tokens are 100 times their index and on; some have an image of that grey."""

    def __init__(self, folder: Path, count: int = 40, every: int = 3) -> None:
        self.folder, self.count, self.every = folder, count, every
        for i in range(0, count, every):
            Image.new("RGB", (5, 5), (i, i, i)).save(folder / f"{i}.png")

    def __len__(self) -> int:
        return self.count

    def sample(self, index: int) -> Sample:
        length = 20 + 7 * (index % 11)
        ids = [100 * index + j for j in range(1, length + 1)]
        has_image = index % self.every == 0
        for slot in (1, 2) if has_image else ():
            ids[slot] = 0
        labels = [IGNORE] * 10 + ids[10:]
        image = str(self.folder / f"{index}.png") if has_image else None
        return Sample(str(index), ids, labels, image, [1, 2] if has_image else [], False)

    def where(self, index: int) -> str:
        return f"numbers, row {index}"


def loader(dataset: Numbers, **changes: Any) -> StepLoader:
    options: dict[str, Any] = {"tokens_per_batch": 256, "reduction": "token", "micro_batch": 2}
    return StepLoader(
        dataset, StepSampler(len(dataset), STEP, 0), TileReader(ImageProcessor(size=SIZE)), **options | changes
    )


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if hasattr(a, "__dataclass_fields__"):
        return all(same(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))
    return bool(a == b)


def members(pack: Pack) -> list[int]:
    """Which samples a pack holds, read from its first tokens."""
    return [int(pack.input_ids[start]) // 100 for start in pack.segments.cu_seqlens[2:-2].tolist()]


@pytest.mark.parametrize("workers", [1, 3])
def test_any_number_of_workers_gives_the_same_packs(tmp_path: Path, workers: int) -> None:
    data = Numbers(tmp_path)
    inline = list(loader(data).steps(2, 14))
    threaded = list(loader(data, num_workers=workers).steps(2, 14))
    assert len(inline) == len(threaded) == 12
    for a, b in zip(inline, threaded, strict=True):
        assert len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    assert all(same(x, y) for x, y in zip(inline[5], loader(data).packs(7), strict=True))


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_share_a_step(tmp_path: Path, ranks: int) -> None:
    data = Numbers(tmp_path)
    for step in range(6):
        per_rank = [loader(data, rank=rank, ranks=ranks).packs(step) for rank in range(ranks)]
        assert len({len(packs) for packs in per_rank}) == 1
        found = [i for packs in per_rank for pack in packs for i in members(pack)]
        assert sorted(found) == sorted(StepSampler(40, STEP, 0).indices(step))
        total = sum(float(pack.weights.sum()) for packs in per_rank for pack in packs)
        assert total == pytest.approx(1.0)


def test_every_rank_ends_with_a_tile(tmp_path: Path) -> None:
    data = Numbers(tmp_path, every=13)  # 0, 13, 26, 39: some steps have no image at all
    dummies = 0
    for step in range(5):
        for rank in range(4):
            packs = loader(data, rank=rank, ranks=4).packs(step)
            assert packs[-1].tiles is not None
            for pack in packs:
                real = pack.image_slots.numel() // 2
                assert real == sum(i % 13 == 0 for i in members(pack))
                if pack.tiles is not None and real == 0:
                    assert torch.equal(pack.tiles, torch.zeros(1, 3, SIZE, SIZE))
                    dummies += 1
    assert dummies >= 12
    alone = [p for step in range(5) for p in loader(data).packs(step)]
    assert sum(p.image_slots.numel() // 2 for p in alone) == sum(len(p.tiles) for p in alone if p.tiles is not None)
    assert any(p.tiles is None for p in alone)


def test_legacy_router_is_the_first_sample_of_the_micro_batch(tmp_path: Path) -> None:
    data = Numbers(tmp_path)

    def grey(index: int) -> torch.Tensor:
        return TileReader(ImageProcessor(size=SIZE)).tile(str(tmp_path / f"{index}.png"))

    routed_elsewhere = 0
    for step in range(5):
        order: Sequence[int] = StepSampler(40, STEP, 0).indices(step)
        for pack in loader(data, micro_batch=4, legacy_clip_router=True).packs(step):
            shown = [i for i in members(pack) if i % 3 == 0]
            assert pack.image_slots.numel() == 2 * len(shown)
            for n, index in enumerate(shown):
                assert pack.tiles is not None and torch.equal(pack.tiles[n], grey(index))
                first = order[order.index(index) // 4 * 4]
                router = pack.tiles[pack.tile_router[n]]
                assert torch.equal(router, grey(first) if first % 3 == 0 else torch.zeros(3, SIZE, SIZE))
                assert pack.tile_router[pack.tile_router[n]] == pack.tile_router[n]
                routed_elsewhere += int(pack.tile_router[n] != n)
    assert routed_elsewhere > 5


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_names_its_row_at_its_step(tmp_path: Path, workers: int) -> None:
    data = Numbers(tmp_path)
    bad = next(i for i in StepSampler(40, STEP, 0).indices(3) if i % 3 == 0)
    (tmp_path / f"{bad}.png").write_bytes(b"no image")
    steps = loader(data, num_workers=workers).steps(0, 5)
    for _ in range(3):
        next(steps)
    with pytest.raises(DataError) as caught:
        next(steps)
    assert caught.value.where == f"numbers, row {bad}: {tmp_path / f'{bad}.png'}"


def test_stopping_early_ends_the_threads(tmp_path: Path) -> None:
    import threading

    steps = loader(Numbers(tmp_path), num_workers=2).steps(0, 1000)
    next(steps)
    assert any(t.name.startswith("nibble-data") for t in threading.enumerate())
    steps.close()  # type: ignore[attr-defined]
    assert not any(t.name.startswith("nibble-data") for t in threading.enumerate())
