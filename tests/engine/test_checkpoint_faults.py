"""A save that dies, or whose file system fails, at every single operation."""

from __future__ import annotations

import errno
import os
import warnings
from pathlib import Path

import pytest
import torch

from engine.checkpoint import find_latest, load_checkpoint, save_checkpoint
from engine.errors import CheckpointError
from engine.files import sweep
from tests.engine import faulty_files


def content(value: int):
    tensors = {"w": torch.full((64,), float(value)), "optimizer/exp_avg/w": torch.full((64,), value + 0.5)}
    return tensors, {"value": value}


def save(run: Path, step: int, value: int, **options):
    tensors, state = content(value)
    return save_checkpoint(run, step, tensors, state, **options)


def value_of(path: Path) -> int:
    tensors, state = load_checkpoint(path)
    expected, _ = content(state["value"])
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    return state["value"]


# what is there before (step, value), and the save under test
SCENARIOS = {
    "next step": ([(1, 1)], dict(step=2, value=2, keep=1)),
    "next step, old ones purged, best kept": ([(1, 1), (2, 2), (3, 3)], dict(step=4, value=4, keep=2, best=1)),
    "same step again": ([(1, 1)], dict(step=1, value=2, keep=1)),
}


def prepare(run: Path, before) -> int:
    """A run with these checkpoints. Returns the value of the newest."""
    run.mkdir()
    with faulty_files.numbered_operations():
        for step, value in before:
            save(run, step, value, keep=9)
    return before[-1][1]


def count_operations(tmp_path: Path, before, under_test) -> int:
    run = tmp_path / "counted"
    prepare(run, before)
    with faulty_files.numbered_operations() as log:
        save(run, **under_test)
    return len(log)


def save_once_more(run: Path) -> None:
    """The run goes on: its next save works and leaves nothing else behind."""
    with faulty_files.numbered_operations():
        save(run, 9, 9, keep=1)
    sweep(run)
    assert value_of(find_latest(run)) == 9
    assert sorted(p.name for p in run.iterdir() if p.is_dir()) == ["step-9"]


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_crash_at_any_operation_leaves_the_earlier_or_the_new_checkpoint(name, tmp_path):
    before, under_test = SCENARIOS[name]
    total = count_operations(tmp_path, before, under_test)
    assert total > 30  # else the shim misses operations
    seen = set()
    for k in range(total):
        run = tmp_path / f"crash-{k}"
        earlier = prepare(run, before)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # 3.12: fork in a process with threads
            child = os.fork()
        if child == 0:
            with faulty_files.numbered_operations(faulty_files.exit_at(k)):
                save(run, **under_test)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9, k
        sweep(run)
        found = find_latest(run)
        assert found is not None, k
        assert value_of(found) in (earlier, under_test["value"]), k
        seen.add(value_of(found))
        assert not [p.name for p in run.iterdir() if p.name.startswith((".tmp-", ".del-"))], k
        save_once_more(run)
    assert seen == {before[-1][1], under_test["value"]}


@pytest.mark.parametrize("name", SCENARIOS)
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_an_error_at_any_operation_is_reported_and_keeps_what_was_there(name, code, tmp_path):
    before, under_test = SCENARIOS[name]
    total = count_operations(tmp_path, before, under_test)
    failures = 0
    for k in range(total):
        run = tmp_path / f"error-{k}"
        earlier = prepare(run, before)
        try:
            with faulty_files.numbered_operations(faulty_files.raise_at(k, code)):
                save(run, **under_test)
        except CheckpointError as error:
            assert os.strerror(code) in str(error)
            failures += 1
        found = find_latest(run)
        assert value_of(found) in (earlier, under_test["value"]), k
        assert not list(run.glob(".tmp-*")), k
        save_once_more(run)
    assert failures > 20  # the rest are failed removals, which only warn


def test_the_first_save_leaves_nothing_or_a_whole_checkpoint(tmp_path):
    total = count_operations(tmp_path, [(1, 1)], dict(step=2, value=2))
    for k in range(total):
        run = tmp_path / f"first-{k}"
        run.mkdir()
        try:
            with faulty_files.numbered_operations(faulty_files.raise_at(k)):
                save(run, 1, 1)
        except CheckpointError:
            pass
        found = find_latest(run)
        assert found is None or value_of(found) == 1, k


def test_everything_is_durable_before_it_gets_its_name_and_before_anything_old_goes(tmp_path):
    """What a power cut could undo: a rename may only publish synced files, a removal only follow a synced rename."""
    run = tmp_path / "run"
    prepare(run, [(1, 1)])
    with faulty_files.numbered_operations() as log:
        save(run, 2, 2, keep=1)
    published = next(i for i, entry in enumerate(log) if entry[0] == "rename" and entry[2].endswith("/step-2"))
    temporary = log[published][1]
    last = {}
    for i, entry in enumerate(log[:published]):
        last.setdefault(entry[1], {})[entry[0]] = i
    written = [path for path, ops in last.items() if path.startswith(temporary + "/") and "create" in ops]
    assert {Path(p).name for p in written} == {
        "model.safetensors", "optimizer.safetensors", "state.json", "manifest.json",
    }  # fmt: skip
    for path in written:
        assert last[path]["fsync"] > last[path]["write"], path
        assert last[temporary]["fsync"] > last[path]["create"], path
    removed = next(i for i, entry in enumerate(log) if entry[0] == "rename" and "/.del-step-1" in entry[2])
    synced = [i for i, entry in enumerate(log) if entry == ("fsync", str(run))]
    pointed = next(i for i, entry in enumerate(log) if entry[0] == "replace" and entry[2].endswith("/latest"))
    assert any(published < i < pointed for i in synced)
    assert pointed < removed
