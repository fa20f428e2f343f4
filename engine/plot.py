"""The loss curve as an SVG: raw values thin, their moving average, evaluation points. No plotting library."""

from __future__ import annotations

import math
from collections.abc import Sequence
from xml.sax.saxutils import escape

from engine.metrics import Ema

Point = tuple[float, float]

WIDTH, HEIGHT = 760, 420
LEFT, RIGHT, TOP, BOTTOM = 66, 20, 46, 50
RAW, SMOOTH, EVAL, GRID, TEXT, AXIS = "#9ec5f4", "#1a56b0", "#d1495b", "#e8eaed", "#3c4043", "#9aa0a6"
MAX_POINTS = 1500  # more cannot be told apart at this width
LOG_RANGE = 100.0


def loss_svg(points: Sequence[Point], eval_points: Sequence[Point] = (), title: str = "loss") -> str:
    """The curve as an SVG document.

    points, eval_points: (step, loss), in order of step; values that are not finite are left out. The y axis is
    logarithmic where the largest loss is more than 100 times the smallest.
    """
    raw = [(x, y) for x, y in points if math.isfinite(y)]
    marks = [(x, y) for x, y in eval_points if math.isfinite(y)]
    everything = raw + marks
    values = [y for _, y in everything] or [0.0]
    is_log = min(values) > 0 and max(values) > LOG_RANGE * min(values)
    x_ticks = linear_ticks(*_bounds([x for x, _ in everything] or [0.0]), count=8)
    y_ticks = _log_ticks(min(values), max(values)) if is_log else linear_ticks(*_bounds(values), count=6)
    x_low, x_high = _bounds([x for x, _ in everything] or [0.0])
    y_low, y_high = y_ticks[0], y_ticks[-1]

    def at(point: Point) -> tuple[float, float]:
        x = LEFT + (point[0] - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)
        y, low, high = (math.log10(v) if is_log else v for v in (point[1], y_low, y_high))
        return x, HEIGHT - BOTTOM - (y - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'font-family="system-ui, -apple-system, Segoe UI, sans-serif" font-size="12">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        _text(LEFT, 26, title, "start", 'font-size="15" font-weight="600"'),
    ]
    for tick in y_ticks:
        _, y = at((x_low, tick))
        parts.append(_line(LEFT, y, WIDTH - RIGHT, y, GRID))
        parts.append(_text(LEFT - 8, y + 4, format_tick(tick), "end"))
    for tick in x_ticks:
        if x_low <= tick <= x_high:
            x, _ = at((tick, y_low))
            parts.append(_line(x, HEIGHT - BOTTOM, x, HEIGHT - BOTTOM + 5, AXIS))
            parts.append(_text(x, HEIGHT - BOTTOM + 19, format_tick(tick), "middle"))
    parts.append(_line(LEFT, HEIGHT - BOTTOM, WIDTH - RIGHT, HEIGHT - BOTTOM, AXIS))
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 10, "step", "middle"))
    if raw:
        parts.append(_path([at(p) for p in _thin(raw)], RAW, 1.0))
        parts.append(_path([at(p) for p in _smooth(raw)], SMOOTH, 2.0))
    if len(marks) > 1:
        parts.append(_path([at(p) for p in marks], EVAL, 1.2))
    parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{EVAL}"/>' for x, y in map(at, marks)]
    if not everything:
        parts.append(_text(WIDTH / 2, HEIGHT / 2, "no values yet", "middle"))
    legend = [("loss", RAW), ("moving average", SMOOTH)] if raw else []
    parts += _legend(legend + ([("evaluation", EVAL)] if marks else []))
    return "\n".join([*parts, "</svg>"]) + "\n"


def linear_ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers (1, 2, 2.5 or 5 times a power of ten apart) that cover [low, high], about `count` of them."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1.0, 2.0, 2.5, 5.0, 10.0) if m * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def format_tick(value: float) -> str:
    """The shortest text of a round number: 0.25, 1500, 2e+06."""
    return f"{value:g}" if abs(value) < 1e-12 or 1e-3 <= abs(value) < 1e6 else f"{value:.3g}"


def _bounds(values: list[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    if high - low > 1e-9 * max(abs(low), abs(high)):
        return low, high
    margin = abs(low) * 0.1 or 1.0  # a single value, or a flat line: in the middle
    return low - margin, high + margin


def _log_ticks(low: float, high: float) -> list[float]:
    return [10.0**e for e in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]


def _thin(points: list[Point]) -> list[Point]:
    """At most about MAX_POINTS: the smallest and the largest of each stretch, so that spikes stay visible."""
    if len(points) <= MAX_POINTS:
        return points
    stride = math.ceil(2 * len(points) / MAX_POINTS)
    thin: list[Point] = []
    for start in range(0, len(points), stride):
        stretch = points[start : start + stride]
        thin += sorted({min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])})
    return thin


def _smooth(points: list[Point]) -> list[Point]:
    ema = Ema(1.0 - 1.0 / max(4.0, len(points) / 60.0))  # a window of about a 60th of the run
    return _thin([(x, ema.update(y)) for x, y in points])


def _path(points: list[tuple[float, float]], color: str, width: float) -> str:
    data = "M" + " L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    return f'<path d="{data}" fill="none" stroke="{color}" stroke-width="{width}" stroke-linejoin="round"/>'


def _line(x1: float, y1: float, x2: float, y2: float, color: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{color}"/>'


def _text(x: float, y: float, text: str, anchor: str, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{TEXT}" {more}>{escape(text)}</text>'


def _legend(entries: list[tuple[str, str]]) -> list[str]:
    """One row at the top right, laid out from the right edge."""
    parts: list[str] = []
    x = float(WIDTH - RIGHT)
    for name, color in reversed(entries):
        x -= 7.0 * len(name)
        parts.append(_text(x, 26, name, "start"))
        parts.append(f'<rect x="{x - 22:.1f}" y="20.5" width="16" height="3" rx="1.5" fill="{color}"/>')
        x -= 40.0
    return parts
