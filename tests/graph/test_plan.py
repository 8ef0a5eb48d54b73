"""The rules of plans: what is refused, what a key covers, and the dense form against the definition of visibility."""

from __future__ import annotations

import hashlib
import struct
import sys
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import strategies
from kvgraph import plan as plan_module
from kvgraph.errors import PlanError
from kvgraph.plan import Group, Laid, Place, Plan, Span, contiguous, lay_out, pruned
from soak import draws

VOCAB = 16


def prompt(start: int = 0, sees: Sequence[Place] = (), tokens: Sequence[int] = (99,)) -> Span:
    return contiguous(tokens, start, sees, cached=False, name="query")


DOC = contiguous([1, 2, 3], 0, name="doc")


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ([], "a plan needs at least one span"),
        ([DOC], "the last span of a plan is the prompt span"),
        ([Span((), range(0), cached=False)], "span 0 is empty"),
        ([Span((1, 2), range(3), cached=False)], "span 0 has 2 tokens but 3 positions"),
        ([Span((1, 2), (4, 4), cached=False)], "span 0: positions must be strictly ascending"),
        ([Span((1, 2), range(2, 0, -1), cached=False)], "strictly ascending"),
        ([DOC, prompt(3, [Place(1, 0)])], r"span 1 \(query\) sees span 1, which isn't earlier"),
        ([DOC, prompt(3, [Place(-1, 0)])], "sees span -1"),
        ([DOC, prompt(3, [Place(0, 0, 1, 4)])], r"sees tokens 1..4 of span 0, which has 3"),
        ([DOC, prompt(3, [Place(0, 0, 2, 2)])], r"sees tokens 2..2"),
        ([prompt(), contiguous([1], 1, [Place(0, 0)]), prompt(2)], "span 1 is cached but sees span 0, which is not"),
    ],
)
def test_refused(spans, message):
    with pytest.raises(PlanError, match=message):
        Plan(tuple(spans))


def test_places_are_normalised():
    plan = Plan((DOC, prompt(3, [Place(0, 0), Place(0, 5, 1)])))
    assert plan.prompt.sees == (Place(0, 0, 0, 3), Place(0, 5, 1, 3))
    assert plan.highest_position == 3


def test_pruned_drops_what_the_prompt_does_not_read():
    a, b, c = DOC, contiguous([4], 3, [Place(0, 0)]), contiguous([5], 3, [Place(0, 0)])
    plan = pruned([a, b, c, prompt(4, [Place(2, 3)])])
    assert [s.tokens for s in plan.spans] == [(1, 2, 3), (5,), (99,)]
    assert plan.spans[1].sees == (Place(0, 0, 0, 3),) and plan.prompt.sees == (Place(1, 3, 0, 1),)


def key(span: Span, earlier: Sequence[Span] = (DOC,), fingerprint: str = "model", salt: str = "") -> str:
    keys = Plan((*earlier, span, prompt(50))).keys(fingerprint, salt)
    assert keys[-1] is None
    result = keys[len(earlier)]
    assert result is not None and len(result) == 64
    return result


READER = contiguous([4, 5], 10, [Place(0, 2), Place(0, 7, 1, 2)])
GROUPED = replace(READER, sees=(Place(0, 2, group=1), Place(0, 7, 1, 2)), groups=(Group(0.9, 0.8), Group(0.9, 0.8)))


@pytest.mark.parametrize(
    "other",
    [
        replace(READER, tokens=(4, 6)),
        replace(READER, tokens=(5, 4)),
        replace(READER, positions=range(11, 13)),  # the places now lie elsewhere relative to it
        replace(READER, positions=(10, 12)),
        replace(READER, sees=(Place(0, 3), Place(0, 7, 1, 2))),
        replace(READER, sees=(Place(0, 2), Place(0, 7, 0, 2))),
        replace(READER, sees=(Place(0, 2), Place(0, 7, 1, 3))),
        replace(READER, sees=(Place(0, 2),)),
        replace(READER, sees=(*READER.sees, Place(0, 2))),  # a duplicate counts
        replace(READER, sees=()),
        contiguous([4, 5, 4], 10, READER.sees),
    ],
)
def test_a_key_changes_with(other):
    assert key(other) != key(READER)


@pytest.mark.parametrize(
    "other",
    [
        READER,
        replace(READER, groups=GROUPED.groups),
        replace(GROUPED, sees=(Place(0, 2), Place(0, 7, 1, 2, group=1))),
        replace(GROUPED, sees=(Place(0, 2, group=1), Place(0, 7, 1, 2, group=1))),  # joint
        replace(GROUPED, sees=(Place(0, 2, group=1), Place(0, 7, 1, 2, group=2))),  # apart
        replace(GROUPED, groups=(Group(0.8, 0.8), Group(0.9, 0.8))),
        replace(GROUPED, groups=(Group(0.9, 0.9), Group(0.9, 0.8))),
        replace(GROUPED, groups=(Group(0.8, 0.9), Group(0.9, 0.8))),
    ],
)
def test_a_key_changes_with_groups(other):
    assert key(other) != key(GROUPED)


@pytest.mark.parametrize(
    ("groups", "group", "message"),
    [
        ([], 1, r"span 1 \(query\) has a place in group 1, but 0 groups"),
        ([Group()], 2, "a place in group 2, but 1 groups"),
        ([Group()], -1, "a place in group -1"),
        ([Group()], 0.5, "numbers must be integers"),
        ([Group(temperature=0)], 1, "group 1 has temperature 0; it must be from 0.001 to 1000"),
        ([Group(), Group(scale=float("nan"))], 1, "group 2 has scale nan"),
        ([Group(scale=-1)], 1, "group 1 has scale -1"),
        ([Group(temperature=float("inf"))], 1, "group 1 has temperature inf"),
        ([Group("warm")], 1, r"group 1 must be Group\(temperature, scale\)"),
        ([(1, 1, 1)], 1, "group 1 must be Group"),
        ([0.9], 1, "group 1 must be Group"),
    ],
)
def test_groups_that_make_no_sense(groups, group, message):
    with pytest.raises(PlanError, match=message):
        Plan((DOC, replace(prompt(3, [Place(0, 0, group=group)]), groups=tuple(groups))))


def test_groups_are_floats_and_survive_pruning():
    reader = replace(prompt(4, [Place(1, 3), Place(0, 0, group=1)]), groups=((1, 2),))
    plan = pruned([DOC, contiguous([4], 3), contiguous([5], 3), reader])
    assert plan.prompt.groups == (Group(1.0, 2.0),) and type(plan.prompt.groups[0].scale) is float
    assert plan.prompt.sees == (Place(1, 3, 0, 1), Place(0, 0, 0, 3, 1))


def test_a_key_changes_with_model_salt_and_what_is_read():
    other = replace(DOC, tokens=(1, 2, 4))
    keys = {key(READER), key(READER, fingerprint="other"), key(READER, salt="tenant"), key(READER, [other])}
    assert len(keys) == 4
    assert key(READER, fingerprint="ab", salt="c") != key(READER, fingerprint="a", salt="bc")


@pytest.mark.parametrize(
    "same",
    [
        replace(READER, sees=READER.sees[::-1]),
        replace(READER, name="another"),
        replace(READER, positions=(10, 11)),
        contiguous([4, 5], 110, [Place(0, 102), Place(0, 107, 1, 2)]),
        replace(READER, sees=(Place(0, 2, 0, 3), Place(0, 7, 1, 2))),
    ],
)
def test_a_key_stays_with(same):
    assert key(same) == key(READER)


def test_a_key_does_not_depend_on_the_place_in_the_plan():
    moved = contiguous([1, 2, 3], 77)
    reader = replace(READER, sees=(Place(1, 2), Place(1, 7, 1, 2)))
    assert key(reader, [contiguous([8], 0), moved]) == key(READER)


def test_the_bytes_of_a_key():
    """A stored corpus outlives this code: changing these bytes means a new key format."""

    def digest(*fields: bytes) -> str:
        return hashlib.sha256(b"".join(len(f).to_bytes(8, "little") + f for f in fields)).hexdigest()

    def ids(*tokens: int) -> bytes:
        return b"".join(token.to_bytes(8, "little") for token in tokens)

    head = (b"kvgraph-key-1", b"model", b"salt")
    doc = digest(*head, ids(1, 2, 3), b"range")
    views = (f"{doc} -8 0 3".encode(), f"{doc} -3 1 2".encode())
    assert Plan((DOC, READER, prompt(50))).keys("model", "salt") == [
        doc,
        digest(*head, ids(4, 5), b"range", *views),
        None,
    ]
    floats = struct.pack("<2d", 0.9, 0.8)
    grouped = digest(*head, ids(4, 5), b"range", views[0] + b" 1", views[1], floats, floats)
    assert Plan((DOC, GROUPED, prompt(50))).keys("model", "salt")[1] == grouped


def plain_keys(plan: Plan) -> list[str | None]:
    """The keys as the rules have them, place by place."""
    keys: list[str | None] = []
    for span in plan.spans:
        relative = np.asarray(span.positions, dtype="<i8") - span.start
        fields = [b"kvgraph-key-1", b"f", b"s", np.array(span.tokens, dtype="<i8").tobytes()]
        fields.append(b"range" if relative[-1] == len(span) - 1 else relative.tobytes())
        for child, at, lo, hi, group in sorted(
            (keys[p.span], p.at - span.start, *p[2:]) for p in span.sees if span.cached
        ):
            fields.append(f"{child} {at} {lo} {hi}{f' {group}' if group else ''}".encode())
        fields += [struct.pack("<2d", *group) for group in span.groups]
        digest = hashlib.sha256(b"".join(len(f).to_bytes(8, "little") + f for f in fields))
        keys.append(digest.hexdigest() if span.cached else None)
    return keys


@settings(deadline=None, max_examples=draws(100))
@given(strategies.plans(VOCAB))
def test_keys_are_those_of_the_rules(plan):
    assert plan.keys("f", "s") == plain_keys(plan)


@pytest.mark.parametrize("read", [1, 2], ids=["a chain", "a chain with a reader of half of it"])
def test_keys_of_a_chain_are_those_of_the_rules(read):
    """The lines of a chain grow from span to span; equal spans, and readers of only a part, begin anew."""
    spans: list[Span] = []
    places: tuple[Place, ...] = ()
    for i in range(40):
        spans.append(contiguous([i % 3, 7], 2 * i, places if i % 5 else places[::read][: len(places)]))
        places = (*places, Place(i, 2 * i))
    plan = Plan((*spans, prompt(100, places)))
    assert plan.keys("f", "s") == plain_keys(plan)
    assert len(set(plan.keys("f", "s"))) == 41


def test_a_chains_places_are_checked_once():
    """Each is one object for all its readers, so a long chain's plan is quickly made; a wrong one is found all the same."""
    spans: list[Span] = []
    places: tuple[Place, ...] = ()
    for i in range(10):
        spans.append(contiguous([1, 2], 2 * i, places))
        places = (*places, Place(i, 2 * i))
    plan = Plan((*spans, prompt(20, places)))
    for i, span in enumerate(plan.spans):
        assert all(place is plan.prompt.sees[n] for n, place in enumerate(span.sees)) and len(span.sees) == i
    with pytest.raises(PlanError, match="sees span 10, which isn't earlier"):
        Plan((*spans, prompt(20, (*places, Place(10, 0)))))
    with pytest.raises(PlanError, match="is cached but sees span 0, which is not"):
        Plan((prompt(0), contiguous([1], 1, [Place(0, 0)]), contiguous([1], 2, [Place(0, 0), Place(1, 1)]), prompt(9)))
    with pytest.raises(PlanError, match="which has 2"):
        Plan((*spans, contiguous([3], 20, (*places[:-1], Place(9, 18, 0, 3))), prompt(30)))


def test_tokens_that_spans_share_are_checked_once(monkeypatch):
    """A segment of a hundred thousand tokens may have a thousand versions."""
    checked, tokens = [], (1, 2, 3)
    integers = plan_module._integers
    monkeypatch.setattr(
        plan_module, "_integers", lambda values, what: (checked.append(values), integers(values, what))[1]
    )
    Plan((*(contiguous(tokens, 3 * i) for i in range(5)), contiguous(tokens, 20, cached=False)))
    assert sum(values is tokens for values in checked) == 1
    assert sum(isinstance(values, range) for values in checked) == 6
    wrong = (1, -(1 << 60))
    with pytest.raises(PlanError, match="span 0: tokens are out of range"):
        Plan((Span(wrong, range(2)), Span(wrong, range(2), cached=False)))
    for positions in (range(1 << 60, (1 << 60) + 2), range((1 << 60) - 1, (1 << 60) + 1)):
        with pytest.raises(PlanError, match="span 0: positions are out of range"):
            Plan((Span((1, 2), positions, cached=False),))


def test_dense_by_hand():
    """A document read at two places by two spans: laid out once a frame."""
    plan = Plan((DOC, contiguous([4, 5], 3, [Place(0, 0)]), prompt(9, [Place(0, 1), Place(1, 6)])))
    dense = plan.dense()
    rows = sorted(zip(dense.span.tolist(), dense.tokens.tolist(), dense.positions.tolist(), strict=True))
    assert rows == [(0, 1, 1), (0, 1, 3), (0, 2, 2), (0, 2, 4), (0, 3, 3), (0, 3, 5), (1, 4, 6), (1, 5, 7), (2, 99, 9)]
    assert dense.prompt == 1
    seen = dense.visible[-1]
    assert sorted(zip(dense.tokens[seen].tolist(), dense.positions[seen].tolist(), strict=True)) == [
        (1, 1),
        (2, 2),
        (3, 3),
        (4, 6),
        (5, 7),
        (99, 9),
    ]


def test_dense_hides_keys_at_or_above_the_reader():
    dense = Plan((DOC, prompt(1, [Place(0, 0)], tokens=[8, 9]))).dense()
    assert dense.visible[-2:].tolist() == [[True, False, False, True, False], [True, True, False, True, True]]


def test_dense_gives_overlapping_views_columns_of_their_own():
    """The second view overlaps the first, the third only the second: three views, no column used twice."""
    doc = contiguous(range(6), 0)
    views = [Place(0, 0, 0, 2), Place(0, 0, 1, 4), Place(0, 0, 3, 6)]
    dense = Plan((doc, prompt(9, views))).dense()
    assert sorted(dense.tokens[dense.visible[-1]].tolist()) == [0, 1, 1, 2, 3, 3, 4, 5, 99]


def test_dense_names_the_group_of_every_pair():
    reader = replace(contiguous([4, 5], 3, [Place(0, 0, 0, 2, 1), Place(0, 0, 2)]), groups=(Group(0.5),))
    asking = replace(prompt(9, [Place(0, 1, 0, 2), Place(1, 6, group=2)]), groups=(Group(), Group(2.0)))
    dense = Plan((DOC, reader, asking)).dense()
    assert dense.groups == (Group(0.5), Group(), Group(2.0))
    found = {
        (token, int(dense.tokens[column]), int(dense.group[row, column]))
        for row, token in enumerate(dense.tokens.tolist())
        for column in np.flatnonzero(dense.group[row])
    }
    assert found == {(4, 1, 1), (4, 2, 1), (5, 1, 1), (5, 2, 1), (99, 4, 3), (99, 5, 3)}
    assert Plan((DOC, prompt(3, [Place(0, 0)]))).dense().group is None


def test_dense_of_a_long_chain():
    spans = [contiguous([0], 0)]
    for i in range(1, 1500):
        spans.append(contiguous([i], i, [Place(i - 1, i - 1)]))
    plan = Plan((*spans, prompt(1500, [Place(1499, 1499)])))
    assert plan.dense().visible.sum() == 2 * 1501 - 1


def laid_out_recursively(spans: Sequence[Span], roots: Sequence[int]) -> list[Laid]:
    """`lay_out` as its definition says: a span after all it reads, depth first."""
    found: dict[tuple[int, int, int], int] = {}
    laid: list[Laid] = []

    def lay(index: int, start: int, copy: int) -> int:
        if (index, start, copy) not in found:
            sees, seen = [], []  # seen: (span, where it stands, which copy, lo, hi)
            for p in spans[index].sees:
                at = p.at - spans[index].start + start
                taken = {n for s, a, n, lo, hi in seen if (s, a) == (p.span, at) and lo < p.hi and p.lo < hi}
                n = next(n for n in range(len(seen) + 1) if n not in taken)
                seen.append((p.span, at, n, p.lo, p.hi))
                sees.append((lay(p.span, at, n), p))
            found[index, start, copy] = len(laid)
            laid.append(Laid(index, start, tuple(sees)))
        return found[index, start, copy]

    for root in roots:
        lay(root, spans[root].start, 0)
    return laid


@settings(deadline=None, max_examples=draws(200))
@given(strategies.plans(4, max_spans=6), st.data())
def test_laying_out_equals_the_recursive_definition(plan, data):
    spans = plan.spans
    roots = data.draw(st.lists(st.sampled_from(range(len(spans))), min_size=1, max_size=3))
    assert lay_out(spans, roots) == laid_out_recursively(spans, roots)


def test_laying_out_leaves_the_recursion_limit_alone(monkeypatch):
    spans = [contiguous([0], 0), *(contiguous([i], i, [Place(i - 1, i - 1, hi=1)]) for i in range(1, 3000))]
    before = sys.getrecursionlimit()
    monkeypatch.setattr(sys, "setrecursionlimit", None)
    assert [laid.span for laid in lay_out(spans, [2999])] == list(range(3000))
    assert sys.getrecursionlimit() == before < 3000


def meaning_of_plan(plan: Plan) -> list[list[str]]:
    """A hash of all that can reach a token's KV, by the definition: its id and what it sees, at relative positions."""
    meanings: list[list[str]] = []
    for span in plan.spans:
        mine: list[str] = []
        for i, at in enumerate(span.positions):
            seen = [(0, span.positions[j] - at, mine[j]) for j in range(i)]
            for place in span.sees:
                child = plan.spans[place.span]
                for j in range(place.lo, place.hi):
                    position = place.at + child.positions[j] - child.start
                    if position < at:
                        seen.append((place.group, position - at, meanings[place.span][j]))
            mine.append(_meaning(span.tokens[i], seen, span.groups))
        meanings.append(mine)
    return meanings


def meaning_of_dense(plan: Plan) -> list[str]:
    """The same for the live rows of the dense form."""
    d = plan.dense()
    meanings: list[str] = []
    for i in range(len(d.tokens)):
        assert not d.visible[i, i + 1 :].any() and d.visible[i, i]
        columns = np.flatnonzero(d.visible[i, :i])
        group = np.zeros_like(d.visible, int) if d.group is None else d.group
        seen = [(int(group[i, j]), int(d.positions[j] - d.positions[i]), meanings[j]) for j in columns]
        meanings.append(_meaning(int(d.tokens[i]), seen, d.groups))
    return meanings[-d.prompt :]


def _meaning(token: int, seen: list[tuple[int, int, str]], groups: Sequence[Group]) -> str:
    """seen: (group, distance, meaning). What matters of a group is its weights and members, not its number."""
    members: dict[int, list[tuple[int, str]]] = {}
    for group, distance, meaning in seen:
        members.setdefault(group, []).append((distance, meaning))
    alone = sorted(members.pop(0, []))
    together = sorted((groups[g - 1], sorted(found)) for g, found in members.items())
    return hashlib.sha256(repr((token, alone, together)).encode()).hexdigest()


@settings(deadline=None, max_examples=draws(200))
@given(strategies.plans(VOCAB))
def test_dense_means_what_the_plan_means(plan):
    assert meaning_of_dense(plan) == meaning_of_plan(plan)[-1]
    dense = plan.dense()
    assert dense.positions[-dense.prompt :].tolist() == list(plan.prompt.positions)
    assert dense.tokens[-dense.prompt :].tolist() == list(plan.prompt.tokens)


@settings(deadline=None, max_examples=draws(100))
@given(strategies.problems(VOCAB))
def test_dense_means_what_a_methods_plan_means(problem):
    method, graph = problem
    plan = method.plan(graph)
    assert meaning_of_dense(plan) == meaning_of_plan(plan)[-1]


@settings(deadline=None, max_examples=draws(200))
@given(strategies.plans(2, max_length=2), strategies.plans(2, max_length=2))
def test_equal_keys_mean_equal_kv(one, two):
    """The unforgivable failure: two spans with one key but different KV."""
    found: dict[str, list[str]] = {}
    for plan in (one, two):
        for k, meaning in zip(plan.keys("model"), meaning_of_plan(plan), strict=True):
            if k is not None:
                assert found.setdefault(k, meaning) == meaning


@pytest.mark.parametrize(
    ("span", "what"),
    [
        (Span((1.5,), (0,), cached=False), "tokens must be integers"),
        (Span(("a",), (0,), cached=False), "tokens must be integers"),
        (Span((1, 2), (0, 1.9), cached=False), "positions must be integers"),
        (Span((1 << 70,), (0,), cached=False), "out of range"),
        (Span((1,), (9,), (Place(0, 0.5),), cached=False), "numbers must be integers"),
        (Span((1,), (9,), (Place(0, 1 << 70),), cached=False), "out of range"),
        (Span((1,), (9,), (3,), cached=False), "isn.t a Place"),
    ],
)
def test_numbers_of_a_plan_are_integers(span, what):
    with pytest.raises(PlanError, match=what):
        Plan((contiguous((1, 2), 0), span))


def test_integers_of_other_libraries_give_the_same_keys():
    plain = Plan((contiguous((1, 2), 0), contiguous((3,), 2, [Place(0, 0)], cached=False)))
    other = Plan((contiguous(np.array([1, 2]), np.int64(0)), contiguous((3,), 2, [(np.int64(0), 0)], cached=False)))
    assert plain.keys("f") == other.keys("f")
