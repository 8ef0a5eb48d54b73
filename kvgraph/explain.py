"""A plan as a table for people: one line per span, what it sees where, what is cached."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby, pairwise

from kvgraph.plan import Place, Plan, Span

MOST_RUNS = 4  # position runs shown of a prompt span
MOST_VIEWS = 6  # places shown of what a span sees


def explain(plan: Plan) -> str:
    """A text table of the plan: every span's number, name, tokens, positions, state, and what it sees where.

    - "doc 1 @ 17": token 0 of doc 1 stands at position 17 for this reader.
    - "doc 1[3:9] @ 16": only tokens 3 to 8 of it, at positions 19 to 24.
    - "doc 0 … doc 4 @ 17": neighbouring spans that share position 17.
    - "doc 1 @ 17 in group 1": weighed as a line below the table says.

    The last line gives totals. Positions are as the method counts them.
    """
    header = ("#", "span", "tokens", "positions", "state", "sees")
    rows = [header]
    for i, span in enumerate(plan.spans):
        state = "cached" if span.cached else "prompt"
        rows.append((str(i), span.name or "-", f"{len(span):,}", _positions(span), state, _views(plan, span.sees)))
    widths = [max(len(row[c]) for row in rows) for c in range(len(header))]
    right = (0, 2)  # number columns
    lines = (
        "  ".join(
            cell.rjust(w) if c in right else cell.ljust(w) for c, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
    table = [line.rstrip() for line in lines]
    rule = "  ".join("─" * w for w in widths[:-1]) + "  ────"
    return "\n".join([table[0], rule, *table[1:], "", *_groups(plan), _summary(plan)])


def _groups(plan: Plan) -> list[str]:
    """A line for each group of each span."""
    return [
        f"{span.name or f'#{i}'}: group {g} has temperature {group.temperature:g} and scale {group.scale:g}"
        for i, span in enumerate(plan.spans)
        for g, group in enumerate(span.groups, 1)
    ]


def _summary(plan: Plan) -> str:
    sizes = {key: len(span) for key, span in zip(plan.keys(""), plan.spans, strict=True) if key is not None}
    cached = [span for span in plan.spans if span.cached]
    computed = sum(len(span) for span in plan.spans if not span.cached)
    total = sum(map(len, cached))
    text = f"{plan.method}: " if plan.method else ""
    text += f"{_count(len(plan.spans), 'span')}; {_count(total, 'token')} cached in {_count(len(cached), 'span')}"
    if len(sizes) < len(cached):  # equal spans are encoded once
        text += f" ({len(sizes):,} distinct: {_count(sum(sizes.values()), 'token')})"
    return text + f", {computed:,} in the prompt span; highest position {plan.highest_position:,}"


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}" + ("" if n == 1 else "s")


def _positions(span: Span) -> str:
    """Positions as runs: "17–50", or "51–55, 90–94, 120–140" with gaps."""
    if isinstance(span.positions, range) and span.positions.step == 1:
        return _run(span.positions[0], span.positions[-1])
    gaps = [i + 1 for i, (a, b) in enumerate(pairwise(span.positions)) if b > a + 1]
    bounds = pairwise([0, *gaps, len(span)])
    return _abbreviated([_run(span.positions[a], span.positions[b - 1]) for a, b in bounds], MOST_RUNS)


def _run(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}–{last}"


def _views(plan: Plan, places: Sequence[Place]) -> str:
    """What a span sees: neighbouring whole spans that share a position are one entry."""
    entries = []
    for _, group in groupby(enumerate(places), key=lambda item: _sharing(plan, *item)):
        run = [place for _, place in group]
        names = _view(plan, run[0]) if len(run) == 1 else f"{_view(plan, run[0])} … {_view(plan, run[-1])}"
        entries.append(f"{names} @ {run[0].at}" + (f" in group {run[0].group}" if run[0].group else ""))
    return _abbreviated(entries, MOST_VIEWS)


def _sharing(plan: Plan, index: int, place: Place) -> tuple[int, ...]:
    """Equal for neighbouring places of whole, consecutive spans at one position; otherwise unique to the place."""
    whole = (place.lo, place.hi) == (0, len(plan.spans[place.span]))
    shared = (place.at, place.group, place.span - index)
    return shared if whole else (*shared, place.lo, index)


def _view(plan: Plan, place: Place) -> str:
    child = plan.spans[place.span]
    name = child.name or f"#{place.span}"
    return name if (place.lo, place.hi) == (0, len(child)) else f"{name}[{place.lo}:{place.hi}]"


def _abbreviated(entries: Iterable[str], most: int) -> str:
    """All entries; if there are too many, the first ones, how many are left out, and the last."""
    shown = list(entries)
    if len(shown) > most:
        shown[most - 2 : -1] = [f"… {len(shown) - most + 1} more …"]
    return ", ".join(shown)
