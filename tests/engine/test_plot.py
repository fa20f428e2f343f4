from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree

import pytest

from engine.plot import HEIGHT, MAX_POINTS, WIDTH, format_tick, linear_ticks, loss_svg

SVG = "{http://www.w3.org/2000/svg}"
DECAY = [(step, 2.0 + math.exp(-step / 300) + 0.1 * math.sin(step)) for step in range(10, 4000, 10)]


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def curves(svg: str) -> list[list[tuple[float, float]]]:
    paths = ElementTree.fromstring(svg).iter(f"{SVG}path")
    return [[tuple(map(float, p.strip("ML ").split())) for p in path.get("d").split(" L")] for path in paths]


@pytest.mark.parametrize(
    "points",
    [
        [],
        [(1, 2.0)],
        [(1, 0.0), (2, 0.0)],
        [(1, -3.0), (2, 4.0)],
        [(1, float("nan")), (2, 1.0), (3, float("inf"))],
        [(1, 1e-9), (2, 1e9)],
        DECAY,
    ],
    ids=["none", "one", "flat", "negative", "not finite", "18 decades", "decay"],
)
@pytest.mark.parametrize("eval_points", [[], [(100, 2.5)], [(100, 2.5), (900, 2.1)]])
def test_the_drawing_is_well_formed_and_inside_its_frame(points, eval_points):
    svg = loss_svg(points, eval_points, "a <b> & c")
    assert "a <b> & c" in texts(svg)
    assert "nan" not in svg
    assert "inf" not in svg.replace("title", "")
    for curve in curves(svg):
        assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in curve)
    circles = list(ElementTree.fromstring(svg).iter(f"{SVG}circle"))
    assert len(circles) == len(eval_points)


def test_lower_loss_is_drawn_lower_and_later_further_right():
    (raw, smooth, *_) = curves(loss_svg([(0, 4.0), (50, 3.0), (100, 1.0)]))
    assert raw[0][0] < raw[1][0] < raw[2][0]
    assert raw[0][1] < raw[1][1] < raw[2][1]
    assert raw[2][1] > smooth[2][1] > raw[0][1]  # the average lags behind


def test_the_axis_is_logarithmic_from_a_range_of_a_hundred_on():
    (straight, *_) = curves(loss_svg([(0, 1000.0), (1, 10.0), (2, 0.1)]))
    assert straight[1][1] - straight[0][1] == pytest.approx(straight[2][1] - straight[1][1], abs=0.2)
    (bent, *_) = curves(loss_svg([(0, 9.0), (1, 0.9), (2, 0.1)]))
    assert bent[1][1] - bent[0][1] > 5 * (bent[2][1] - bent[1][1])


def test_a_long_run_is_thinned_and_keeps_its_spikes():
    points = [(step, 1.0) for step in range(100_000)]
    points[77_777] = (77_777, 9.0)
    raw, smooth, *_ = curves(loss_svg(points))
    assert len(raw) <= MAX_POINTS + 10
    assert len(smooth) <= MAX_POINTS + 10
    assert sum(y < 100 for _, y in raw) == 1


def test_the_legend_names_what_is_drawn():
    assert {"loss", "moving average", "evaluation"} <= set(texts(loss_svg(DECAY, [(10, 1.0)], "run")))
    assert "evaluation" not in texts(loss_svg(DECAY, [], "run"))
    assert "no values yet" in texts(loss_svg([], [], "run"))


@pytest.mark.parametrize(("low", "high"), [(0.13, 4.7), (0, 7940), (-3.2, 1.1), (1e-7, 3e-7), (99.98, 100.02)])
def test_ticks_are_round_cover_the_range_and_are_few(low, high):
    ticks = linear_ticks(low, high, 6)
    assert ticks[0] <= low + 1e-12
    assert ticks[-1] >= high - 1e-12
    assert 3 <= len(ticks) <= 10
    mantissa = (ticks[1] - ticks[0]) / 10 ** math.floor(math.log10((ticks[1] - ticks[0]) * 1.0000001))
    assert any(mantissa == pytest.approx(m) for m in (1, 2, 2.5, 5))


def test_tick_labels():
    assert [format_tick(v) for v in (0.0, 0.25, 1500.0, 2e6, 1e-4)] == ["0", "0.25", "1500", "2e+06", "0.0001"]
