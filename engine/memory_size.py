"""Amounts of memory as people type and read them."""

from __future__ import annotations

import re

UNITS = {"mb": 10**6, "gb": 10**9, "mib": 2**20, "gib": 2**30}


def parse_size(text: str) -> int:
    """Bytes of "0", "512MB", "1.5 GB" or "4GiB". Raises ValueError for anything else, a number without its unit too."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip().lower())
    if found is None or (found[2] not in UNITS and (found[2] or float(found[1]))):
        raise ValueError("it must be 0 or a number of MB, GB, MiB or GiB: 512MB, 4GB")
    return int(float(found[1]) * UNITS.get(found[2], 0))


def gib(size: float) -> str:
    """Bytes as GiB, or MiB when small."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**29 else f"{size / 2**20:.1f} MiB"
