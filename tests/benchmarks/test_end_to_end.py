"""Whole steps at toy size on a CPU: every trainer builds and steps; LaVIN-lite's loop computes what the engine does."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks import end_to_end
from benchmarks.goals import GOALS
from benchmarks.hugging_face import MODELING, HuggingFaceTrainer
from benchmarks.lavin_lite import LavinTrainer
from benchmarks.problem import Case
from benchmarks.rows import Row, parse
from benchmarks.step import MODELS, build
from benchmarks.trainers import LR, NibbleTrainer, Trainer, packs_of
from benchmarks.workload import Workload, of_lengths, workload
from engine.data.packing import filled_tokens
from models.adapters.mma import AdapterConfig
from models.vlm import VisionLanguageModel
from tests.benchmarks.made_up_rows import ORIGIN

CPU = torch.device("cpu")
TOY = end_to_end.SHAPES["toy"]
VOCABULARY, SIZE = TOY.language.vocab_size, TOY.tower.image_size


def toy_model(dropout: float = 0.0) -> VisionLanguageModel:
    return build(TOY.language, 2, CPU, dtype=torch.float32, adapter=AdapterConfig(dropout=dropout))


def toy_work(samples: int = 4, seed: int = 0) -> Workload:
    return workload(samples, VOCABULARY, SIZE, seed=seed, longest=TOY.longest)


def toy_rows(monkeypatch: pytest.MonkeyPatch, **shape: Any) -> list[Row]:
    """Of a case with peers, where nothing else is said."""
    monkeypatch.setattr(end_to_end, "FULL", 4)
    tiny: dict[str, Any] = {"model": "toy", "T": 128, "samples": 4, "policy": "auto", "cap": 0} | shape
    case = Case("end_to_end", tiny, modes=("step",))
    return list(end_to_end.rows(case, CPU, ORIGIN, False))


def test_a_step_has_scienceqas_mean_tail_images_and_targets() -> None:
    for count in (end_to_end.STEP, end_to_end.FULL):
        work = workload(count, 32000, 2, seed=3)
        lengths = [len(sample.input_ids) for sample in work.samples]
        assert work.tokens / count == pytest.approx(286, rel=0.03)
        assert max(lengths) == 511 and sum(length == 511 for length in lengths) / count == pytest.approx(0.11, abs=0.02)
        assert work.supervised / count == pytest.approx(200, rel=0.03)
        assert work.images == count / 2
        assert all(bool(s.image_slots) == (tile is not None) for s, tile in zip(work.samples, work.tiles, strict=True))
    assert sorted(lengths) == sorted(len(s.input_ids) for s in workload(count, 32000, 2, seed=4).samples)


def test_28_samples_fill_one_pack_of_8192_and_one_sample_fills_its_pack() -> None:
    (pack,) = packs_of(workload(end_to_end.FULL, 32000, 2), 8192, "sample")
    assert pack.input_ids.numel() == 8192 and filled_tokens(pack) > 0.98 * 8192
    (single,) = end_to_end.step_samples(end_to_end.cases()[1], end_to_end.SHAPES["7B"])
    (pack,) = packs_of(single, 512, "sample")
    assert pack.input_ids.numel() == 512 and single.images == 1


def test_no_peer_is_timed_after_a_profile_and_goals_find_theirs() -> None:
    cases = end_to_end.cases()
    profiled = [end_to_end.is_profiled(case) for case in cases]
    assert profiled == sorted(profiled) and sum(profiled) == 2
    assert all(end_to_end.trainers(case, quick=False) == ("nibble",) for case in cases if end_to_end.is_profiled(case))
    (g18,) = (goal for goal in GOALS if goal.id == "G18")
    names = {case.name for case in cases if end_to_end.is_profiled(case)}
    assert {name for condition in g18.conditions for name in condition.cases} == names


def test_lavin_lites_loop_computes_what_the_engine_does() -> None:
    """Losses of four steps, images among the samples: forward, every gradient and the update are the same."""
    vlm = toy_model()
    lavin = LavinTrainer(vlm, CPU, dtype=torch.float32, padded=TOY.longest, lr=1e-2)
    nibble = NibbleTrainer(vlm, 128, CPU, lr=1e-2)
    losses = []
    for work in [toy_work(seed=seed) for seed in (0, 1, 0, 1)]:
        theirs, ours = lavin.step(lavin.prepare(work)), nibble.step(nibble.prepare(work))
        assert theirs == pytest.approx(ours, rel=1e-4)
        losses.append(ours)
    assert losses[2] < 0.99 * losses[0]  # it learns: the updates are part of what is compared


def test_padding_and_the_order_of_samples_change_no_loss() -> None:
    vlm, work = toy_model(), toy_work()
    losses = {
        LavinTrainer(vlm, CPU, dtype=torch.float32, padded=padded, polite=polite, order=order)
        for padded, polite, order in ((64, False, None), (96, True, 5))
    }
    assert len({round(trainer.step(trainer.prepare(work)), 5) for trainer in losses}) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_lavin_lite_in_16_bits_is_near_the_loss_in_32(dtype: torch.dtype) -> None:
    """With autocast, loss scale and updates, as on a GPU."""
    vlm, work = toy_model(), toy_work()
    losses = []
    for of in (torch.float32, dtype):
        trainer = LavinTrainer(vlm, CPU, dtype=of, padded=TOY.longest, lr=1e-2)
        batch = trainer.prepare(work)
        losses.append([trainer.step(batch) for _ in range(3)])
    assert losses[1][0] == pytest.approx(losses[0][0], rel=0.02)
    assert losses[1][2] < losses[1][0]


def test_lavin_lite_shares_the_packed_weights_and_not_what_trains() -> None:
    vlm = toy_model()
    packed = vlm.language.blocks()[0].attention.q.frozen_weight()
    trainer = LavinTrainer(vlm, CPU, dtype=torch.float32, padded=TOY.longest)
    assert trainer.model.layers[0].attention.wq.weight.data_ptr() == packed.codes.data_ptr()
    assert trainer.borrowed_bytes > 0
    before = {name: p.detach().clone() for name, p in vlm.trainable().items()}
    trainer.step(trainer.prepare(toy_work()))
    assert all(torch.equal(before[name], p) for name, p in vlm.trainable().items())
    trained = sum(p.numel() for p in vlm.trainable().values())
    assert sum(p.numel() for _, p in trainer.model.trainable()) == trained


def test_peft_trains_lora_on_q_and_v_of_a_4_bit_model() -> None:
    trainer = HuggingFaceTrainer(TOY.language, CPU, dtype=torch.float32)
    names = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
    assert len(names) == 2 * 2 * 2 and all("lora_" in name and (".q_" in name or ".v_" in name) for name in names)
    layer = trainer.model.base_model.model.model.layers[0]
    state = layer.mlp.up_proj.weight.quant_state
    assert state.nested and state.quant_type == "nf4" and state.blocksize == 64
    batch = trainer.prepare(toy_work(8))
    assert [ids.shape[0] for ids in batch.ids] == [4, 4]
    losses = [trainer.step(batch) for _ in range(3)]
    assert losses[2] < losses[0]


def test_liger_serves_its_own_model_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it patches transformers' module, for all."""
    modeling: Any = importlib.import_module(MODELING)
    own = modeling.apply_rotary_pos_emb
    calls: list[str] = []

    def rotate(*arguments: Any, **options: Any) -> Any:
        calls.append("liger")
        return own(*arguments, **options)

    class Liger:
        @staticmethod
        def apply_liger_kernel_to_llama(model: Any) -> None:
            modeling.apply_rotary_pos_emb = rotate

    monkeypatch.setitem(sys.modules, "liger_kernel", Liger)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", Liger)
    with_liger = HuggingFaceTrainer(TOY.language, CPU, dtype=torch.float32, liger=True)
    assert modeling.apply_rotary_pos_emb is own
    plain = HuggingFaceTrainer(TOY.language, CPU, dtype=torch.float32)
    batch = plain.prepare(toy_work())
    plain.step(batch)
    assert calls == []
    with_liger.step(batch)
    assert calls and modeling.apply_rotary_pos_emb is own


def test_every_trainer_makes_a_row_and_a_missing_peer_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = toy_rows(monkeypatch)
    assert len(rows) == 5 and {row.variant for row in rows} == {"nibble", *end_to_end.PEERS}
    for row in rows:
        assert parse(row.flat()) == row
    missing = [row for row in rows if row.failure is not None]
    if importlib.util.find_spec("liger_kernel") is None:
        assert [row.failure for row in missing] == ["ModuleNotFoundError: No module named 'liger_kernel'"]
    timed = [row for row in rows if row.failure is None]
    assert {row.flops for row in timed} == {timed[0].flops}  # of the same useful work
    for row in timed:
        assert row.ms and row.samples == end_to_end.ROUNDS and row.mode == "step"
        assert row.samples_per_s == pytest.approx(4 * row.samples / (row.ms / 1e3 * row.samples), rel=0.5)
        assert row.tokens_per_s and row.fraction
    (ours,) = (row for row in rows if row.variant == "nibble")
    assert ours.policy == "language: save_all x 2; vision: save_all x 6"


def test_a_policy_and_one_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    (row,) = toy_rows(monkeypatch, samples=1, policy="keep_input", cap=24)
    assert row.policy == "language: keep_input x 2; vision: keep_input x 6"
    assert row.tokens_per_s == pytest.approx(126 * (row.samples_per_s or 0))


def test_mfu_counts_weights_and_real_tokens_alone() -> None:
    config = MODELS["7B"]
    work = of_lengths([100], config.vocab_size, 2)
    layers, head = 6_476_005_376, 32000 * 4096
    assert end_to_end.useful_flops(work, config) == 4 * (layers * 100 + head * work.supervised)


@pytest.mark.parametrize("trainer", [NibbleTrainer, LavinTrainer])
def test_a_step_leaves_nothing_to_the_next(trainer: Callable[..., Trainer]) -> None:
    """Gradients are gone after a step: two steps on one batch with no learning rate have the same loss."""
    vlm = toy_model()
    one = NibbleTrainer(vlm, 128, CPU, lr=0.0) if trainer is NibbleTrainer else LavinTrainer(
        vlm, CPU, dtype=torch.float32, padded=TOY.longest, lr=0.0
    )  # fmt: skip
    batch = one.prepare(toy_work())
    assert one.step(batch) == one.step(batch) and LR > 0
