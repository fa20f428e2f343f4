from __future__ import annotations

import json

from engine.scaler import GROWTH_INTERVAL, LossScaler


def test_an_overflow_halves_the_scale_and_asks_for_the_same_step_again():
    scaler = LossScaler(enabled=True)
    assert scaler.scale == 65536.0
    assert scaler.backoff()
    assert scaler.scale == 32768.0


def test_at_scale_one_the_value_itself_is_not_finite():
    scaler = LossScaler(enabled=True)
    repeats = 0
    while scaler.backoff():
        repeats += 1
    assert repeats == 16
    assert scaler.scale == 1.0


def test_it_grows_after_that_many_good_steps_in_a_row():
    scaler = LossScaler(enabled=True)
    for _ in range(GROWTH_INTERVAL - 1):
        scaler.good_step()
    scaler.backoff()  # breaks the row
    for _ in range(GROWTH_INTERVAL - 1):
        scaler.good_step()
    assert scaler.scale == 32768.0
    scaler.good_step()
    assert scaler.scale == 65536.0


def test_disabled_it_is_one_and_never_repeats():
    scaler = LossScaler(enabled=False)
    for _ in range(2 * GROWTH_INTERVAL):
        scaler.good_step()
    assert scaler.scale == 1.0
    assert not scaler.backoff()


def test_state_survives_a_checkpoint():
    scaler = LossScaler(enabled=True)
    scaler.backoff()
    scaler.good_step()
    again = LossScaler(enabled=True)
    again.load(json.loads(json.dumps(scaler.state())))
    assert again == scaler
    other_precision = LossScaler(enabled=False)
    other_precision.load(scaler.state())
    assert other_precision.scale == 1.0
