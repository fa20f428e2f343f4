"""A frozen tower looks at an image once; losses are those of a tower that looks each time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.data.image_processor import ImageProcessor
from engine.data.images import TileReader
from engine.data.loader import StepLoader
from engine.data.sample import IGNORE, Sample
from engine.data.sampler import StepSampler
from engine.distributed import Ranks
from engine.errors import DataError
from engine.graphs import GraphedPasses, Passes, signature
from engine.optim import Optimizer
from engine.scaler import LossScaler
from engine.step import StepResult, train_step
from engine.tower_cache import TABLE_BYTES, TowerCache, image_bytes, keeps_features, most_bytes
from kernels import attention
from models.vision.clip import CLIP_L_14_224, CLIP_L_14_336, ClipConfig
from models.vision.tower import make_tower
from models.vlm import VisionLanguageModel
from tests.engine.tape import TapeRecorder
from tests.models.tiny import IMAGE_SIZE, VOCAB, tiny_config, tiny_model

CPU = torch.device("cpu")
SAMPLES, STEP = 20, 5


class Pictures:
    """Two of three samples have an image; samples 0 and 1 have the same one."""

    def __len__(self) -> int:
        return SAMPLES

    def sample(self, index: int) -> Sample:
        generator = torch.Generator().manual_seed(index)
        length = 20 + 3 * index
        ids = torch.randint(1, VOCAB, (length,), generator=generator).tolist()
        image = f"{max(index, 1)}.png" if index % 3 != 2 else None
        labels = [IGNORE] * 12 + ids[12:]
        return Sample(str(index), ids, labels, image, [1, 2, 3, 4, 5, 6] if image else [], False)

    def where(self, index: int) -> str:
        return f"row {index}"


IMAGES = {s.image for s in map(Pictures().sample, range(SAMPLES))} - {None}


class Reader(TileReader):
    """Random tiles by path; counts what it is asked for."""

    def __init__(self) -> None:
        super().__init__(ImageProcessor(size=IMAGE_SIZE))
        self.read: list[str] = []

    def tile(self, path: str, where: str = "") -> Tensor:
        self.read.append(path)
        return torch.randn(3, self.size, self.size, generator=torch.Generator().manual_seed(int(path[:-4])))


class Run:
    """Steps of a model whose tower is frozen, over a loader."""

    def __init__(self, table: int | None, *, workers: int = 0, graphs: bool = False) -> None:
        self.model = tiny_model(tiny_config(train_vision="frozen", num_layers=1)).train()
        self.looks: list[int] = []
        self.model.vision.register_forward_pre_hook(lambda _, args: self.looks.append(len(args[0])))
        cache = None
        if table is not None:
            width = self.model.config.vision.width
            cache = TowerCache(self.model.vision, CPU, images=99, most_new=4, table_bytes=table * 6 * 4 * width)
            assert cache.places.rows == table
        self.passes = GraphedPasses(CPU, TapeRecorder(), cache) if graphs else Passes(CPU, cache)
        self.reader = Reader()
        self.loader = StepLoader(
            Pictures(), StepSampler(SAMPLES, STEP, 0), self.reader, tokens_per_batch=256, reduction="token",
            micro_batch=1, num_workers=workers, few_shapes=graphs, places=self.passes.places,
        )  # fmt: skip
        self.optimizer = Optimizer(self.model.named_parameters(), weight_decay=0.0)

    def steps(self, first: int, end: int) -> list[StepResult]:
        return [
            train_step(
                self.model, packs, self.optimizer, LossScaler(False), Ranks(0, 0, 1),
                step=first + i, seed=0, lr=1e-2, clip_grad=None, device=CPU, passes=self.passes,
            )
            for i, packs in enumerate(self.loader.steps(first, end))
        ]  # fmt: skip


@pytest.mark.parametrize("workers", [0, 3])
def test_the_tower_looks_once_and_losses_stay(workers: int) -> None:
    plain, kept = Run(None), Run(50, workers=workers)
    expected, found = plain.steps(0, 12), kept.steps(0, 12)  # three epochs
    assert [r.loss for r in found] == pytest.approx([r.loss for r in expected], rel=1e-5)
    assert [r.grad_norm for r in found] == pytest.approx([r.grad_norm for r in expected], rel=1e-4)
    assert kept.looks == [1] * len(IMAGES) and sorted(kept.reader.read) == sorted(str(i) for i in IMAGES)
    assert sum(plain.looks) == 3 * sum(Pictures().sample(i).image is not None for i in range(SAMPLES))


class Shared(Pictures):
    """Three images for all samples: the same one in several packs of a step, not in the order of samples."""

    def sample(self, index: int) -> Sample:
        sample = super().sample(index)
        return replace(sample, image=sample.image and f"{index % 3 + 1}.png")


@pytest.mark.parametrize("workers", [0, 3])
def test_an_image_of_several_samples_is_new_in_the_first_pack_that_has_it(workers: int) -> None:
    plain, kept = Run(None), Run(50, workers=workers)
    plain.loader.dataset = kept.loader.dataset = Shared()
    expected, found = plain.steps(0, 8), kept.steps(0, 8)
    assert [r.loss for r in found] == pytest.approx([r.loss for r in expected], rel=1e-5)
    assert len(kept.looks) == 2  # sample 3 n + 2 has none


def test_each_rank_looks_at_the_images_that_it_meets() -> None:
    """What is new to this rank is not what is new to the step."""
    for rank in (0, 1):
        run = Run(50)
        run.loader.rank, run.loader.ranks = rank, 2
        assert run.passes.features is not None
        run.loader.order = StepSampler(SAMPLES, 4, 0)
        for packs in run.loader.steps(0, 15):
            for pack in packs:
                filled = run.passes.features.fill(pack)
                shown = filled.image_slots.numel() // 6
                assert not shown or (filled.features is not None and filled.features[:shown].abs().amax((1, 2)).all())


def test_new_images_make_no_other_shape() -> None:
    """Else the graphs of the first epoch would be all, and serve no other."""
    run = Run(50, graphs=True)
    assert isinstance(run.passes, GraphedPasses) and run.passes.features is not None
    shapes = []
    for _ in range(2):
        packs = next(run.loader.steps(0, 1))
        assert any(pack.tiles is not None for pack in packs)
        run.reader.read.clear()
        shapes.append({signature(run.passes.features.fill(pack)) for pack in packs})
        run.passes.features.places.clear = lambda: None  # type: ignore[method-assign]
        seen = next(run.loader.steps(0, 1))
        assert all(pack.tiles is None for pack in seen)
        shapes.append({signature(run.passes.features.fill(pack)) for pack in seen})
        del run.passes.features.places.clear
    assert shapes[0] == shapes[1] == shapes[2] == shapes[3]


def test_a_step_can_be_asked_for_after_others_were_prepared() -> None:
    run = Run(50)
    prepared = run.loader.steps(0, 2)
    next(prepared)
    prepared.close()
    assert len(run.loader.packs(7)) > 0


def test_images_without_room_are_looked_at_each_time() -> None:
    kept, small = Run(50), Run(4, workers=2)
    assert small.steps(0, 12) == kept.steps(0, 12)  # bit for bit: the tower sees one image at a time
    assert len(kept.looks) < len(small.looks) < 3 * len(IMAGES)


def test_a_row_that_cannot_be_read_keeps_no_step_waiting() -> None:
    class Broken(Pictures):
        def sample(self, index: int) -> Sample:
            if index in StepSampler(SAMPLES, STEP, 0).indices(2):
                raise DataError(f"row {index} is broken")
            return super().sample(index)

    run = Run(50, workers=3)
    run.loader.dataset = Broken()
    steps = run.loader.steps(0, 8)
    assert len(next(steps)) and len(next(steps))
    with pytest.raises(DataError, match="is broken"):
        next(steps)


def test_a_resumed_run_is_the_same_run() -> None:
    """An image that was new in the first epoch is new again after it, in another pack."""
    whole, first, second = Run(50), Run(50), Run(50)
    expected = whole.steps(0, 8)
    found = first.steps(0, 5)
    second.model.load_state_dict(first.model.state_dict())
    second.optimizer.load_state_tensors(first.optimizer.state_tensors())
    assert found + second.steps(5, 8) == expected


def test_features_are_inputs_of_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, *options: Any) -> Tensor:
        return attention.varlen_attention_reference(q, k, v, bounds, causal=options[1], scale=options[2])

    monkeypatch.setitem(attention.IMPLEMENTATIONS, "sdpa", attend)
    plain, graphed = Run(None), Run(50, graphs=True)
    expected, found = plain.steps(0, 12), graphed.steps(0, 12)
    assert [r.loss for r in found] == pytest.approx([r.loss for r in expected], rel=1e-5)
    assert isinstance(graphed.passes, GraphedPasses) and graphed.passes.replayed > graphed.passes.launched
    assert graphed.looks == [1] * len(IMAGES)


def test_features_are_kept_of_a_tower_of_which_nothing_learns() -> None:
    def model(**options: Any) -> VisionLanguageModel:
        return tiny_model(tiny_config(**options))

    frozen = model(train_vision="frozen")
    assert keeps_features(frozen.vision, 4)
    for trained in (model(), model(vision_placement="normal"), model(train_vision="full")):
        assert not keeps_features(trained.vision, 4)
    last = frozen.vision.blocks()[-1].mlp.up
    last.requires_grad_(True)
    assert not keeps_features(frozen.vision, 4)
    last.requires_grad_(False)
    frozen.vision.class_embedding.requires_grad_(True)
    assert not keeps_features(frozen.vision, 4)


def test_features_of_many_tokens_are_not_kept() -> None:
    """A table would have room for few images, and the tower would look at all others one by one."""
    with torch.device("meta"):
        lavins, patches = (make_tower(config).requires_grad_(False) for config in (CLIP_L_14_224, CLIP_L_14_336))
        small = make_tower(ClipConfig(image_size=56, select_feature="patch")).requires_grad_(False)
    assert [keeps_features(tower, 2) for tower in (lavins, patches, small)] == [True, False, True]
    assert (image_bytes(CLIP_L_14_224, 2), image_bytes(CLIP_L_14_336, 2)) == (12 * 1024, 576 * 2048)
    cache = TowerCache(small, torch.device("meta"), images=9, most_new=2)
    assert cache.values.shape == (1 + 9 + 2, 16, 1024)


def test_a_table_takes_what_a_plan_says() -> None:
    tower = tiny_model(tiny_config(train_vision="frozen")).vision
    cache = TowerCache(tower, torch.device("meta"), images=10**9, most_new=3)
    assert cache.values.nbytes == most_bytes(tower.config, 4, 3)
    assert TABLE_BYTES < cache.values.nbytes <= TABLE_BYTES + 4 * 6 * 4 * tower.config.width
