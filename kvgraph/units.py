"""Sizes as people write them: the same on the command line, in the environment and in configuration files. Pure Python.

pydantic's ByteSize isn't used: it takes 4G as 4 · 1000³, and the core works without pydantic.
"""

from __future__ import annotations

import re

UNITS = {"": 1, "B": 1} | {f"{p}{s}": 1024**i for i, p in enumerate("KMGT", 1) for s in ("", "iB")}
UNITS |= {f"{p}B": 1000**i for i, p in enumerate("KMGT", 1)}
SHOWN = ("B", "KiB", "MiB", "GiB", "TiB")


def parse_size(text: str) -> int:
    """Bytes of "4GiB" (= "4G", 1024³ each), "500MB" (1000² each) or "1000". Raises ValueError."""
    match = re.fullmatch(r"(\d{1,18}(?:\.\d{1,18})?)\s*([A-Za-z]*)", text.strip())
    unit = next((size for name, size in UNITS.items() if match and name.lower() == match[2].lower()), None)
    if match is None or unit is None or not 0 < (size := int(float(match[1]) * unit)) < 1 << 63:
        raise ValueError(f"{text[:40]!r} isn't a size; write for example 4GiB or 500MB")
    return size


def human_size(size: float) -> str:
    """1536 → "1.5 KiB"."""
    for unit in SHOWN[:-1]:
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} {SHOWN[-1]}"
