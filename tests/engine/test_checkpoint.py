from __future__ import annotations

import json
import logging
import random
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.checkpoint import find_latest, load_checkpoint, save_checkpoint
from engine.errors import CheckpointError
from engine.tensor_file import DTYPES, write_tensors


def some_tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "language.layers.0.attention_adapter.down.weight": torch.randn(8, 16, generator=generator),
        "projector.fc1.weight": torch.randn(5, 7, generator=generator).to(torch.bfloat16),
        "modality_embedding.weight": torch.randn(2, 3, generator=generator).t(),  # strided
        "optimizer/exp_avg/projector.fc1.weight": torch.randn(5, 7, generator=generator),
        "optimizer/step/projector.fc1.weight": torch.tensor(3.0),
        "rng/torch": generator.get_state(),
    }


STATE = {"samples": 12, "loss": 0.1 + 0.2, "scaler": {"scale": 65536.0}, "policies": ["save", "recompute"]}


def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


def names(run: Path) -> list[str]:
    return sorted(p.name for p in run.iterdir())


def test_tensors_and_state_come_back_bit_for_bit(tmp_path):
    tensors = some_tensors()
    path = save_checkpoint(tmp_path, 120, tensors, STATE)
    assert path == tmp_path / "step-120"
    loaded, state = load_checkpoint(path)
    assert state == STATE
    assert loaded.keys() == tensors.keys()
    assert all(equal(loaded[name], tensors[name]) for name in tensors)
    assert (tmp_path / "latest").read_text() == "step-120\n"


def test_only_the_groups_asked_for_are_read(tmp_path):
    path = save_checkpoint(tmp_path, 1, some_tensors(), {})
    loaded, _ = load_checkpoint(path, only=("model",))
    assert sorted(loaded) == sorted(name for name in some_tensors() if "/" not in name)


def test_files_are_safetensors_and_json_only(tmp_path):
    path = save_checkpoint(tmp_path, 1, some_tensors(), STATE)
    assert names(path) == [
        "manifest.json",
        "model.safetensors",
        "optimizer.safetensors",
        "rng.safetensors",
        "state.json",
    ]
    assert json.loads((path / "state.json").read_text()) == STATE
    assert "exp_avg/projector.fc1.weight" in load_file(path / "optimizer.safetensors")


def test_our_writer_agrees_with_the_safetensors_library(tmp_path):
    tensors = {str(dtype): (torch.arange(6).reshape(2, 3) % 2).to(dtype) for dtype in DTYPES}
    tensors |= {"scalar": torch.tensor(1.5), "empty": torch.zeros(0, 4, dtype=torch.float16)}
    size, _ = write_tensors(tmp_path / "ours", tensors)
    save_file(tensors, tmp_path / "theirs")
    assert size == (tmp_path / "ours").stat().st_size == (tmp_path / "theirs").stat().st_size
    ours, theirs = load_file(tmp_path / "ours"), load_file(tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    assert all(equal(ours[name], theirs[name]) for name in theirs)


def test_a_dtype_that_the_format_lacks_is_named(tmp_path):
    with pytest.raises(TypeError, match=r"'?z'? has dtype torch.complex64"):
        write_tensors(tmp_path / "f", {"z": torch.zeros(1, dtype=torch.complex64)})


def test_the_newest_are_kept_and_the_best(tmp_path):
    for step in (1, 2, 3, 4, 5):
        save_checkpoint(tmp_path, step, some_tensors(step), {}, keep=2, best=2 if step >= 2 else None)
    assert names(tmp_path) == ["best", "latest", "step-2", "step-4", "step-5"]
    assert (tmp_path / "best").read_text() == "step-2\n"
    save_checkpoint(tmp_path, 6, some_tensors(), {}, keep=1, best=6)
    assert names(tmp_path) == ["best", "latest", "step-6"]


def test_a_future_that_the_run_has_left_goes_with_the_next_save(tmp_path, caplog):
    for step in (1, 2, 9):
        save_checkpoint(tmp_path, step, some_tensors(), {}, keep=9)
    save_checkpoint(tmp_path, 3, some_tensors(), {}, keep=9)  # resumed from step 2
    assert names(tmp_path) == ["latest", "step-1", "step-2", "step-3"]
    assert "step-9" in caplog.text


def test_saving_a_step_again_replaces_it(tmp_path):
    save_checkpoint(tmp_path, 1, some_tensors(), {"n": 1})
    save_checkpoint(tmp_path, 1, some_tensors(), {"n": 2})
    assert names(tmp_path) == ["latest", "step-1"]
    assert load_checkpoint(find_latest(tmp_path))[1] == {"n": 2}


def test_too_little_disk_is_an_error_before_anything_changes(tmp_path, monkeypatch):
    tensors = {"w": torch.zeros(100_000)}
    save_checkpoint(tmp_path, 1, tensors, {"n": 1}, keep=1)
    before = names(tmp_path)
    size = sum(f.stat().st_size for f in (tmp_path / "step-1").iterdir())
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - size, int(1.1 * size)))
    with pytest.raises(CheckpointError, match=r"step-2 needs .* free") as caught:
        save_checkpoint(tmp_path, 2, tensors, {}, keep=1)
    assert caught.value.exit_code == 7
    assert names(tmp_path) == before
    assert load_checkpoint(find_latest(tmp_path))[1] == {"n": 1}


def test_state_that_is_no_json_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(TypeError):
        save_checkpoint(tmp_path, 1, some_tensors(), {"x": object()})
    assert names(tmp_path) == []


def test_nothing_found_is_none_and_names_that_are_no_checkpoint_are_ignored(tmp_path):
    assert find_latest(tmp_path / "absent") is None
    for name in ("step-x", "step-", "checkpoint-3", ".tmp-step-4-abc", "step-5.bak"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-7").write_text("a file")
    assert find_latest(tmp_path) is None


def test_steps_are_ordered_as_numbers(tmp_path):
    for step in (9, 10, 100):
        save_checkpoint(tmp_path, step, some_tensors(), {}, keep=9)
    assert find_latest(tmp_path).name == "step-100"


def test_a_wrong_hint_does_not_matter(tmp_path):
    save_checkpoint(tmp_path, 1, some_tensors(), {})
    (tmp_path / "latest").write_text("step-77")
    assert find_latest(tmp_path).name == "step-1"


def test_damaged_candidates_are_named_and_the_one_before_is_taken(tmp_path, caplog):
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, some_tensors(step), {}, keep=9)
    (tmp_path / "step-3/manifest.json").unlink()
    data = bytearray((tmp_path / "step-2/model.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "step-2/model.safetensors").write_bytes(data)
    with caplog.at_level(logging.WARNING, "nibble"):
        assert find_latest(tmp_path).name == "step-1"
    assert "step-3 is damaged: manifest.json" in caplog.text
    assert "step-2 is damaged: model.safetensors has crc32" in caplog.text
    assert find_latest(tmp_path, verify="size").name == "step-2"


@pytest.mark.parametrize("name", ["model.safetensors", "state.json", "manifest.json"])
def test_the_quick_check_sees_what_is_missing_or_short(tmp_path, name):
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, some_tensors(), STATE, keep=9)
    (tmp_path / "step-3" / name).unlink()
    data = (tmp_path / "step-2" / name).read_bytes()
    (tmp_path / "step-2" / name).write_bytes(data[:-1])
    assert find_latest(tmp_path, verify="size").name == "step-1"


def test_only_damaged_checkpoints_are_an_error_not_a_start_from_zero(tmp_path):
    save_checkpoint(tmp_path, 1, some_tensors(), {})
    (tmp_path / "step-1/state.json").write_text("[]")
    with pytest.raises(CheckpointError, match="no whole checkpoint among step-1"):
        find_latest(tmp_path)


def test_a_checkpoint_of_a_later_format_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("engine.manifest.SCHEMA", 2)
    path = save_checkpoint(tmp_path, 1, some_tensors(), {})
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="format 2, this version reads 1"):
        load_checkpoint(path)


def test_a_copy_under_another_name_loads(tmp_path):
    shutil.copytree(save_checkpoint(tmp_path, 1, some_tensors(), STATE), tmp_path / "kept-for-later")
    assert load_checkpoint(tmp_path / "kept-for-later")[1] == STATE


def swap_two(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "x")
    (directory / "optimizer.safetensors").rename(directory / "model.safetensors")
    (directory / "x").rename(directory / "optimizer.safetensors")


def edit_manifest(directory: Path) -> None:
    path = directory / "manifest.json"
    path.write_text(path.read_text().replace('"torch": "', '"torch": "9'))


def mutants(good: Path, other: Path, count: int):
    """(description, function that damages a copy of `good`); `other` is a checkpoint of the next step."""
    files = sorted(p.name for p in good.iterdir())
    yield from ((f"drop {name}", lambda d, n=name: (d / n).unlink()) for name in files)
    yield from ((f"swap in the other step's {n}", lambda d, n=n: shutil.copy(other / n, d / n)) for n in files)
    yield "swap two files", swap_two
    yield "the other step's whole directory", lambda d: (shutil.rmtree(d), shutil.copytree(other, d))
    yield "manifest of no object", lambda d: (d / "manifest.json").write_text("[1, 2]")
    yield "manifest edited by hand", edit_manifest
    rng = random.Random(7)
    for _ in range(count):
        name = rng.choice(files)
        size = (good / name).stat().st_size
        kind, position, bit = rng.choice(["flip", "truncate", "append", "zero"]), rng.randrange(size), rng.randrange(8)

        def damage(d, name=name, kind=kind, position=position, bit=bit):
            data = bytearray((d / name).read_bytes())
            if kind == "flip":
                data[position] ^= 1 << bit
            elif kind == "truncate":
                del data[position:]
            elif kind == "append":
                data += bytes([bit])
            else:
                data[position : position + 64] = bytes(b ^ 0xFF for b in data[position : position + 64])
            (d / name).write_bytes(data)

        yield f"{kind} {name} at {position} bit {bit}", damage


def test_every_mutant_is_detected_and_the_earlier_checkpoint_taken(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for step in (1, 2, 3):
        save_checkpoint(source, step, some_tensors(step), {"step": step}, keep=9)
    undetected = []
    for number, (name, damage) in enumerate(mutants(source / "step-2", source / "step-3", 200)):
        run = tmp_path / f"run-{number}"
        run.mkdir()
        shutil.copytree(source / "step-2", run / "step-2")
        damage(run / "step-2")
        (run / "step-1").symlink_to(source / "step-1")
        try:
            load_checkpoint(run / "step-2")
            undetected.append(name)
        except CheckpointError:
            pass
        assert find_latest(run) == run / "step-1", name
        shutil.rmtree(run)
    assert not undetected
