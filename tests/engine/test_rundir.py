from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from engine import lock
from engine.checkpoint import save_checkpoint
from engine.environment import describe_environment
from engine.errors import UsageError
from engine.rundir import RunDir

REPO = Path(__file__).parents[2]
HOLD = """
import sys, time
from engine.rundir import RunDir
RunDir(sys.argv[1]).claim()
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """A live process that holds tmp_path/run."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True, cwd=REPO
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def names(path: Path) -> list[str]:
    return sorted(p.name for p in path.iterdir())


def finished_run(path: Path, *, demo: bool = False, code: int | None = 0, steps=(1,)) -> None:
    with RunDir(path).claim() as run:
        run.describe("bits: 4bit\n", ["train.py"], {}, demo=demo)
        for step in steps:
            save_checkpoint(run.path, step, {"w": torch.zeros(1)}, {})
        if code is not None:
            run.write_exit(code, "done")


def test_creating_the_object_touches_nothing(tmp_path):
    assert RunDir(tmp_path / "run").config == tmp_path / "run/config.yaml"
    assert names(tmp_path) == []


def test_what_a_run_is_told_about_itself(tmp_path):
    environment = describe_environment(torch.device("cpu"))
    with RunDir(tmp_path / "a/b").claim() as run:
        run.describe("bits: 4bit\n", ["train.py", "--data", "my rows.json"], environment, demo=False)
        run.write_exit(75, "SIGTERM")
    assert names(run.path) == [".lock", "command.txt", "config.yaml", "env.json", "exit.json"]
    assert run.config.read_text() == "bits: 4bit\n"
    assert run.command.read_text() == "train.py --data 'my rows.json'\n"
    env = json.loads(run.env.read_text())
    assert env["python"] == ".".join(map(str, sys.version_info[:3]))
    assert env["versions"]["torch"] == torch.__version__
    assert env["device"].startswith("cpu")
    assert {"git_commit", "demo", "platform"} <= env.keys()
    exit_record = json.loads(run.exit.read_text())
    assert exit_record["code"] == 75
    assert exit_record["stopped"] is True
    assert exit_record["reason"] == "SIGTERM"


def test_a_resumed_run_adds_its_command_and_forgets_the_old_exit(tmp_path):
    finished_run(tmp_path, code=75)
    with RunDir(tmp_path).claim(resume=True) as run:
        assert not run.exit.exists()
        run.describe("bits: 4bit\n", ["train.py", "--resume", "auto"], {}, demo=False)
    assert run.command.read_text() == "train.py\ntrain.py --resume auto\n"
    assert (tmp_path / "step-1").is_dir()


def test_resuming_where_nothing_is_begins_a_run(tmp_path):
    with RunDir(tmp_path / "run").claim(resume=True) as run:
        assert names(run.path) == [".lock"]


def test_a_live_holder_is_named(tmp_path, holder):
    with pytest.raises(UsageError, match=f"run directory in use by process {holder.pid} on") as caught:
        RunDir(tmp_path / "run").claim(resume=True)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("reaped", [True, False])
def test_a_killed_holder_is_named_and_replaced(tmp_path, holder, reaped, caplog):
    holder.send_signal(signal.SIGKILL)
    if reaped:
        holder.wait()
    else:
        os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)  # dead, but its number is still taken
    with RunDir(tmp_path / "run").claim():
        assert f"process {holder.pid} on" in caplog.text
    with RunDir(tmp_path / "run").claim():
        pass


@pytest.mark.parametrize(
    ("change", "is_free"),
    [
        ({}, False),
        ({"started": 1}, True),  # another process has got the number since
        ({"boot_id": "an earlier start of this machine"}, True),
        ({"host": "elsewhere"}, False),  # cannot be seen from here
        ({"host": "elsewhere", "boot_id": "other", "pid": 99999999}, False),
    ],
)
def test_who_counts_as_alive(tmp_path, holder, change, is_free):
    file = tmp_path / "run/.lock"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    if is_free:
        RunDir(tmp_path / "run").claim().release()
        return
    with pytest.raises(UsageError, match="in use") as caught:
        RunDir(tmp_path / "run").claim()
    assert ("delete" in caught.value.do) == ("host" in change)


def test_a_half_written_lock_is_free(tmp_path):
    (tmp_path / ".lock").write_text('{"pid": 12')
    RunDir(tmp_path).claim().release()


def test_release_leaves_another_process_lock_alone(tmp_path, holder):
    before = (tmp_path / "run/.lock").read_text()
    RunDir(tmp_path / "run").release()
    assert (tmp_path / "run/.lock").read_text() == before
    assert json.loads(before)["host"] == socket.gethostname()


def parse_slowly(text: str, parse=lock._parse):
    """Between reading the lock and writing it there is time enough to be overtaken."""
    time.sleep(0.05)
    return parse(text)


def test_of_many_that_start_at_once_one_gets_the_directory(tmp_path):
    """All find the same stale lock; taking it over must not let two in."""
    stale = {"pid": 99999999, "host": socket.gethostname(), "boot_id": "x", "started": 1, "since": "then"}
    (tmp_path / "run").mkdir()
    (tmp_path / "run/.lock").write_text(json.dumps(stale))
    start = time.time() + 0.5
    children = []
    for _ in range(6):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                lock._parse = parse_slowly
                time.sleep(max(0.0, start - time.time()))
                RunDir(tmp_path / "run").claim()
                code = 0
                time.sleep(0.7)  # alive while the others try
            except UsageError:
                code = 2
            finally:
                os._exit(code)
        children.append(child)
    codes = sorted(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)
    assert codes == [0, 2, 2, 2, 2, 2]


def test_leftovers_of_a_killed_save_are_swept(tmp_path):
    (tmp_path / ".tmp-step-3-abc").mkdir()
    (tmp_path / ".tmp-step-3-abc/model.safetensors").write_text("half")
    (tmp_path / ".del-step-1-abc").mkdir()
    (tmp_path / ".tmp-latest-abc").write_text("half")
    with RunDir(tmp_path).claim():
        assert names(tmp_path) == [".lock"]


@pytest.mark.parametrize(("code", "state"), [(0, "a finished run"), (75, "unfinished run .newest checkpoint: step-2"),
                                             (None, "unfinished run")])  # fmt: skip
def test_a_run_worth_keeping_is_not_begun_again(tmp_path, code, state):
    finished_run(tmp_path, code=code, steps=(1, 2))
    before = names(tmp_path)
    for demo in (False, True):
        with pytest.raises(UsageError, match=state) as caught:
            RunDir(tmp_path).claim(demo=demo)
        assert "--resume auto" in caught.value.do
        assert "--output_dir" in caught.value.do
    assert names(tmp_path) == before
    RunDir(tmp_path).claim(resume=True).release()  # and the refusal left no lock


def test_a_run_that_failed_before_its_first_checkpoint_is_begun_anew(tmp_path):
    finished_run(tmp_path, code=5, steps=())
    (tmp_path / "notes.txt").write_text("mine")
    with RunDir(tmp_path).claim():
        assert names(tmp_path) == [".lock", "notes.txt"]


@pytest.mark.parametrize("code", [0, 75, None])
def test_a_second_demo_replaces_the_first_and_nothing_else(tmp_path, code):
    finished_run(tmp_path, demo=True, code=code, steps=(1, 2))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    (tmp_path / "my notes.txt").write_text("mine")
    (tmp_path / "step-wise").mkdir()
    with RunDir(tmp_path).claim(demo=True):
        assert names(tmp_path) == [".lock", "my notes.txt", "step-wise"]


def test_another_run_does_not_replace_a_demo(tmp_path):
    finished_run(tmp_path, demo=True)
    with pytest.raises(UsageError, match="a finished run"):
        RunDir(tmp_path).claim()


def test_a_folder_with_other_files_can_be_used(tmp_path):
    (tmp_path / "slurm.out").write_text("x")
    with RunDir(tmp_path).claim():
        assert names(tmp_path) == [".lock", "slurm.out"]


def test_a_path_that_cannot_be_a_directory_is_explained(tmp_path):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file/below"):
        with pytest.raises(UsageError, match="cannot write to the run directory"):
            RunDir(path).claim()
