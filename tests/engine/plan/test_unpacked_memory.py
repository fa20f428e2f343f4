"""What memory for 16-bit copies of packed weights is used for, and that it changes how often they are unpacked, and
nothing else."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from engine.config import Config
from engine.flags import parse_train
from engine.memory_size import parse_size
from engine.plan.make import plan_without_weights
from engine.plan.unpacked_memory import divide, least_scratch, share_of, use_memory
from kernels import unpacked
from kernels.few_rows import most_few_rows, set_few_rows
from models.linear import pack_of
from models.vlm import VisionLanguageModel
from tests.models.tiny import gradients, packed_copy, packs_of, random_samples, tiny_config, tiny_model

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LAYER = [30, 10, 40, 20]  # q/k/v, o, gate/up, down
GROUP_BYTES = [4 * 3 * 32 * 32, 4 * 32 * 32, 4 * 2 * 32 * 48, 4 * 32 * 48]  # of the tiny model, in fp32


@pytest.fixture(autouse=True)
def _own_memory() -> Iterator[None]:
    """Neither the buffers of other tests nor ours for them."""
    unpacked.release()
    yield
    unpacked.configure()
    unpacked.release()
    set_few_rows(None)


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("0MB", 0), ("512MB", 512_000_000), ("4GB", 4 * 10**9), ("1.5 gib", 3 * 2**29), ("16MiB", 2**24)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "4", "GB", "-1GB", "4TB", "1e3MB", "4 GB 2", "0x"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="0 or a number of MB, GB, MiB or GiB"):
        parse_size(text)


@pytest.mark.parametrize(
    ("budget", "checkpointing", "scratch", "copied"),
    [
        (0, False, 40, 0),  # the buffer is there in any case
        (0, True, 40, 0),
        (139, False, 40, 0),
        (140, False, 40, 1),
        (340, False, 40, 3),
        (399, False, 40, 3),
        (400, False, 0, 4),  # nothing is left to unpack
        (70, True, 70, 0),  # down, gate and up of a layer stay
        (199, True, 100, 0),
        (200, True, 100, 1),
        (399, True, 100, 2),
        (400, True, 0, 4),
    ],
)
def test_scratch_comes_before_copies(budget: int, checkpointing: bool, scratch: int, copied: int) -> None:
    share = divide(budget, [LAYER] * 4, checkpointing=checkpointing, prefetch=False)
    assert (share.scratch, share.num_copied, share.copies) == (scratch, copied, 100 * copied)
    assert share.scratch + share.copies <= max(budget, 40)


def test_the_reason_has_the_figures() -> None:
    def why(budget: int, checkpointing: bool) -> str:
        return divide(budget, [[2**28, 2**28]] * 4, checkpointing=checkpointing, prefetch=False).why

    assert why(2**30, checkpointing=False) == "256.0 MiB left, the next layer takes 0.50 GiB"
    assert "recomputation and backward share" in why(2**30, checkpointing=True)
    assert why(2**31, checkpointing=True) == "all 4 layers fit"
    assert why(0, checkpointing=True) == "no memory for more"


@pytest.mark.parametrize("checkpointing", [False, True])
def test_prefetch_takes_a_layer_in_any_case(checkpointing: bool) -> None:
    for budget, scratch, copied in ((0, 100, 0), (99, 100, 0), (250, 100, 1), (400, 0, 4)):
        share = divide(budget, [LAYER] * 4, checkpointing=checkpointing, prefetch=True)
        assert (share.scratch, share.num_copied) == (scratch, copied)


def test_a_quantised_head_goes_through_the_buffer_too() -> None:
    for budget, scratch, copied in ((0, 70, 0), (170, 70, 1), (469, 70, 3), (470, 70, 4)):
        share = divide(budget, [LAYER] * 4, checkpointing=False, prefetch=False, head=70)
        assert (share.scratch, share.num_copied) == (scratch, copied)


def test_the_plan_counts_it() -> None:
    line = ["--model.language", os.devnull + "/7B", "--dataset.root", "d", "--gradient_checkpointing"]
    layer = 2 * (4 * 4096**2 + 3 * 4096 * 11008)
    for more, scratch, copied in (
        ([], 2 * 2 * 4096 * 11008, 0),
        (["--runtime.unpacked_memory", "4GB"], layer, 8),
        (["--runtime.unpacked_memory", "13GB"], 0, 32),
        (["--runtime.unpacked_memory", "4GB", "--runtime.device", "cpu"], 4 * 2 * 4096 * 11008, 0),
        (["--runtime.prefetch"], layer, 0),
        (["--bits_head", "4bit"], 2 * 32000 * 4096, 0),
    ):
        memory = plan_without_weights(parse_train([*line, *more])[0], 1).memory_bytes
        assert (memory["dequantisation buffer"], memory["unpacked copies"]) == (scratch, copied * layer)
    dense = plan_without_weights(parse_train([*line, "--bits", "16bit", "--runtime.unpacked_memory", "4GB"])[0], 1)
    assert dense.memory_bytes.get("unpacked copies", 0) == 0


def packed_model(*, checkpointing: bool) -> VisionLanguageModel:
    """Three layers in NF4."""

    def bits(part: str, name: str) -> int:
        return 4 if part == "language" and (".attention." in name or ".mlp." in name) else 16

    return packed_copy(tiny_model(tiny_config(dropout=0.0)), bits, checkpointing=checkpointing)


def step(model: VisionLanguageModel) -> dict[str, Tensor]:
    samples, tiles = random_samples([(20, True), (15, False)])
    loss = model(packs_of(samples, tiles)[0][1])
    return gradients(loss, model.trainable()) | {"loss": loss.detach()}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_fewer_are_unpacked_and_no_bit_changes(checkpointing: bool) -> None:
    layer, groups = sum(GROUP_BYTES), len(GROUP_BYTES)
    expected = step(packed_model(checkpointing=checkpointing))
    counts = {}
    for copied in (0, 1, 3):
        unpacked.release()
        model = packed_model(checkpointing=checkpointing)
        config = Config(gradient_checkpointing=checkpointing)
        scratch = layer if checkpointing else max(GROUP_BYTES)
        config.runtime.unpacked_memory = (
            f"{(scratch + copied * layer) / 10**6:.9f}MB" if copied or checkpointing else "0"
        )
        text = use_memory(config, model.language, CUDA, torch.float32)
        assert f"copies of {copied} of 3 layers" in text
        before = unpacked.counters.dequantisations
        found = step(model)
        counts[copied] = unpacked.counters.dequantisations - before
        assert all(torch.equal(found[name], value) for name, value in expected.items())
    still_there = (
        groups if checkpointing else 1
    )  # of the last layer that is not copied, from its forward to what follows
    dequantised = {copied: 2 * groups * (3 - copied) - still_there * (copied < 3) for copied in counts}
    assert counts == dequantised


def test_the_last_layers_are_copied() -> None:
    model = packed_model(checkpointing=False).language
    config = Config()
    config.runtime.unpacked_memory = f"{(max(GROUP_BYTES) + 2 * sum(GROUP_BYTES)) / 10**6:.9f}MB"
    use_memory(config, model, CUDA, torch.float32)
    found = []
    for block in model.blocks():
        before = unpacked.counters.hits
        for group in block.groups():
            unpacked.weights(pack_of(group), torch.float32)
        found.append(unpacked.counters.hits - before)
    assert found == [0, 4, 4]


def test_auto_takes_what_is_left_and_a_recomputed_layer_wants_a_scratch() -> None:
    config, layer = Config(), sum(GROUP_BYTES)
    assert config.runtime.unpacked_memory == "auto"
    model = packed_model(checkpointing=False).language
    for spare, copied in ((0, 0), (layer - 1, 0), (layer, 1), (3 * layer, 3)):
        share = share_of(config, model, 4, on_cuda=True, spare=spare)
        assert share is not None and share.num_copied == copied
        assert share.scratch == (0 if copied == 3 else least_scratch(config, model, 4, on_cuda=True))
    on_cpu = share_of(config, model, 4, on_cuda=False, spare=10 * layer)
    assert on_cpu is not None and (on_cpu.scratch, on_cpu.num_copied) == (max(GROUP_BYTES), 0)
    model.blocks()[0].policy = "keep_input"
    share = share_of(config, model, 4, on_cuda=True, spare=layer)
    assert share is not None and (share.scratch, share.num_copied) == (layer, 0)
    config.runtime.unpacked_memory = "0"
    share = share_of(config, model, 4, on_cuda=True, spare=10 * layer)
    assert share is not None and (share.scratch, share.num_copied) == (max(GROUP_BYTES), 0)


def test_the_other_settings_are_passed_on() -> None:
    model, config, x = packed_model(checkpointing=False).language, Config(), torch.zeros(1)
    config.runtime.few_rows, config.runtime.prefetch = 3, True
    text = use_memory(config, model, CUDA, torch.float32)
    assert most_few_rows(x) == 3
    assert unpacked._settings == unpacked._Settings(scratch_bytes=sum(GROUP_BYTES), prefetch=True)
    assert "copies of 0 of 3 layers" in text
    use_memory(Config(), model, CUDA, torch.float32)
    assert most_few_rows(x) == 64
    assert not unpacked._settings.prefetch


def test_a_run_on_the_cpu_says_that_it_does_nothing(caplog: pytest.LogCaptureFixture) -> None:
    model = packed_model(checkpointing=False).language
    config = Config()
    config.runtime.unpacked_memory = "4GB"
    with caplog.at_level(logging.WARNING):
        assert use_memory(config, model, CPU, torch.float32) == ""
    assert [record.getMessage() for record in caplog.records] == [
        "--runtime.unpacked_memory has no effect: this run is on the CPU"
    ]
    config.runtime.unpacked_memory = "0"
    caplog.clear()
    assert use_memory(config, model, CPU, torch.float32) == "" and not caplog.records
