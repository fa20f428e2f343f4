"""A bar for each variant: what share of the card's rate it reaches. Plain SVG, no plotting library."""

from __future__ import annotations

from collections.abc import Sequence
from xml.sax.saxutils import escape

from benchmarks.rows import MODES, Row

WIDTH, LEFT, RIGHT, TOP, BAR, GAP = 760, 250, 60, 44, 16, 10
OURS, PEER, GRID, TEXT = "#1a56b0", "#9ec5f4", "#e8eaed", "#3c4043"


def bars(rows: Sequence[Row], title: str) -> str:
    """The largest case of each mode, by operations or bytes; empty where no row has a share."""
    groups = []
    for mode in MODES:
        of_mode = [row for row in rows if row.mode == mode and row.fraction is not None]
        if of_mode:
            case = max(of_mode, key=lambda row: (row.bytes or 0) + (row.flops or 0)).name
            groups.append((f"{mode}, {case}", [row for row in of_mode if row.name == case]))
    if not groups:
        return ""
    scale = max(1.0, *(row.fraction or 0.0 for _, group in groups for row in group))
    parts: list[str] = []
    y = float(TOP)
    for name, group in groups:
        parts.append(_text(12, y + 12, name, "start", ' font-weight="600"'))
        y += BAR + 4
        for row in sorted(group, key=lambda row: -(row.fraction or 0.0)):
            share = row.fraction or 0.0
            length = share / scale * (WIDTH - LEFT - RIGHT)
            color = OURS if row.variant.startswith("nibble") else PEER
            parts.append(_text(LEFT - 8, y + 12, row.variant, "end"))
            parts.append(f'<rect x="{LEFT}" y="{y:.1f}" width="{length:.1f}" height="{BAR - 3}" fill="{color}"/>')
            parts.append(_text(LEFT + length + 6, y + 12, f"{share:.0%}", "start"))
            y += BAR
        y += GAP
    one = LEFT + (WIDTH - LEFT - RIGHT) / scale
    roof = f'<line x1="{one:.1f}" y1="{TOP - 8}" x2="{one:.1f}" y2="{y:.1f}" stroke="{GRID}" stroke-width="2"/>'
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y:.0f}" width="{WIDTH}" height="{y:.0f}" '
        'font-family="system-ui, -apple-system, Segoe UI, sans-serif" font-size="12">'
    )
    background = f'<rect width="{WIDTH}" height="{y:.0f}" fill="white"/>'
    heading = _text(12, 24, f"{title}: share of the card's rate", "start", ' font-size="15" font-weight="600"')
    return "\n".join([head, f"<title>{escape(title)}</title>", background, roof, heading, *parts, "</svg>"]) + "\n"


def _text(x: float, y: float, text: str, anchor: str, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{TEXT}"{more}>{escape(text)}</text>'
