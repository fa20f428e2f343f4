from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from engine.signals import ECHO_SECONDS, STOP_SIGNALS, StopSignals

REPO = Path(__file__).parents[2]
LOOP = """
import sys, time
from engine.signals import StopSignals
with StopSignals() as stop:
    print("ready", flush=True)
    while not stop.stop_requested():
        time.sleep(0.01)
    print("saw " + stop.name, flush=True)
    time.sleep(float(sys.argv[1]))  # the save
sys.exit(75)
"""


@pytest.fixture
def start():
    children = []

    def start(save_seconds: float) -> subprocess.Popen:
        child = subprocess.Popen(
            [sys.executable, "-c", LOOP, str(save_seconds)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=REPO,
        )  # fmt: skip
        children.append(child)
        assert child.stdout.readline() == "ready\n"
        return child

    yield start
    for child in children:
        child.kill()
        child.communicate()


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_the_first_signal_lets_the_step_end_and_the_second_exits_at_once(number, start):
    patient, hurried = start(0.0), start(60.0)
    for child in (patient, hurried):
        child.send_signal(number)
        assert child.stdout.readline() == f"saw {number.name}\n"
    assert patient.wait(10) == 75
    assert f"{number.name}: saving after this step" in patient.stderr.read()
    with pytest.raises(subprocess.TimeoutExpired):
        hurried.wait(ECHO_SECONDS + 0.05)
    hurried.send_signal(signal.SIGTERM)
    assert hurried.wait(10) == 128 + signal.SIGTERM


def test_the_echo_of_a_signal_is_not_a_second_one(start):
    child = start(0.5)
    child.send_signal(signal.SIGINT)
    child.stdout.readline()
    child.send_signal(signal.SIGINT)
    assert child.wait(10) == 75


def test_handlers_are_put_back():
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    with StopSignals() as stop:
        assert not stop.stop_requested()
        assert stop.name == ""
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.stop_requested()
        assert stop.name == "SIGUSR1"
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before
