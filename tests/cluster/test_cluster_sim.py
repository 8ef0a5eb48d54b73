"""The simulation of many replicas: its times are those that one works out by hand, and every request ends."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))  # benchmarks aren't installed
from benchmarks import cluster_sim as sim
from benchmarks import summary

TIMES = sim.Times(warm=1.0, document=10.0, decode=(0.25, 0.5))


def test_times_of_two_requests_by_hand():
    """Both read a and b. The second waits for the first's prefill, finds its documents, and both decode together."""
    first, second = (sim.Request(at, ["a", "b"], 2, True) for at in (0.0, 5.0))
    replica = sim.Replica(TIMES, capacity=2, rows=2)
    sim.simulate(sim.Policy(1, 400), [first, second], [replica])
    assert (first.missed, second.missed) == (2, 0)
    assert first.first_token == 10 + 10 + 1
    assert second.first_token == 21 + 1 + 0.75  # its prefill shares a step with the first's second token
    assert replica.busy == 21 + 1.75 + 0.75
    assert first.left == second.left == 0


def test_memory_keeps_the_last_used_documents():
    wanted = [sim.Request(100.0 * i, [d], 1, True) for i, d in enumerate("abacb")]
    sim.simulate(sim.Policy(1, 400), wanted, [sim.Replica(TIMES, capacity=2, rows=1)])
    assert [r.missed for r in wanted] == [1, 1, 0, 1, 1]


@pytest.mark.parametrize("name", sim.POLICIES)
def test_every_request_ends_and_no_load_is_left(name):
    policy = sim.POLICIES[name](3, 400)
    wanted = [sim.Request(i / 2, [str(i % 7), str(i % 5)], 3, i > 20) for i in range(60)]
    sim.simulate(policy, wanted, [sim.Replica(TIMES, capacity=4, rows=2) for _ in range(3)])
    assert all(r.left == 0 and r.first_token > r.arrival for r in wanted)
    assert policy.load == [0, 0, 0]


def test_the_command_writes_a_section_that_says_it_is_simulated(monkeypatch, tmp_path):
    out, picture = tmp_path / "sim.json", tmp_path / "sim.png"
    words = ["--sizes", "2,3", "--least-requests", "200", "--json", out, "--plot", picture]
    monkeypatch.setattr(sys, "argv", ["benchmarks/cluster_sim.py", *map(str, words)])
    sim.main()
    found = json.loads(out.read_text())
    rates = {(r["policy"], r["replicas"]): r["hit rate"] for r in found["rows"] if r["load"] == "default"}
    assert len(rates) == 8 and rates["span affinity", 2] > rates["power of two", 2]
    assert summary.section(found)[0].startswith("## Simulated, not measured")
    assert picture.read_bytes().startswith(b"\x89PNG")
