"""Intervals and paired tests: against scipy, against counts done by hand, and where there is nothing to resample."""

from __future__ import annotations

import itertools
import math
import time

import numpy as np
import pytest
from scipy import stats as scipy_stats

from kvgraph.eval import stats
from kvgraph.eval.stats import Difference, Interval, clusters_of, holm, mean_interval, paired
from soak import SOAK


def scores(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random(n)


def right_or_wrong(n: int, share: float, seed: int = 0) -> np.ndarray:
    return (scores(n, seed) < share).astype(float)


# -- intervals --------------------------------------------------------------------------------------------------------


def test_the_interval_is_scipys_bca_bootstrap():
    values = scores(40)
    expected = scipy_stats.bootstrap((values,), np.mean, n_resamples=9999, batch=256, rng=np.random.default_rng(3))
    found = mean_interval(values, seed=3)
    assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval), abs=1e-12)
    assert (found.mean, found.n) == (pytest.approx(values.mean()), 40)


def test_the_interval_agrees_with_theory_on_many_items():
    values = right_or_wrong(4000, 0.7)
    exact = scipy_stats.binomtest(int(values.sum()), 4000).proportion_ci(method="wilson")
    found = mean_interval(values)
    assert (found.low, found.high) == pytest.approx((exact.low, exact.high), abs=1.5e-3)


@pytest.mark.parametrize(("n", "share"), [(5, 0.5), (10, 0.1), (40, 0.9), (100, 0.03)])
def test_the_interval_holds_the_truth_about_as_often_as_it_says(n, share, monkeypatch):
    monkeypatch.setattr(stats, "RESAMPLES", 999)
    times = 1000 if SOAK else 100
    found = [mean_interval(right_or_wrong(n, share, seed), seed=seed) for seed in range(times)]
    held = sum(i.low - 1e-9 <= share <= i.high + 1e-9 for i in found) / times
    assert held >= 0.86


@pytest.mark.parametrize(("n", "right"), [(1, 0), (1, 1), (5, 5), (100, 0)])
def test_scores_that_are_all_alike_get_wilsons_interval_instead_of_a_width_of_0(n, right):
    exact = scipy_stats.binomtest(right, n).proportion_ci(method="wilson")
    found = mean_interval([float(right > 0)] * n)
    assert (found.low, found.high) == pytest.approx((exact.low, exact.high), abs=1e-12)
    assert found.high - found.low > 0


def test_scores_that_are_all_one_half_have_an_interval_around_it():
    found = mean_interval([0.5] * 20)
    assert found.mean == 0.5 and 0.4 < found.low < 0.5 < found.high < 0.6


def test_copies_of_items_tell_nothing_new_when_they_are_one_cluster():
    values = scores(30)
    copied, keys = np.repeat(values, 10), np.repeat(np.arange(30), 10).tolist()
    alone, clustered, careless = mean_interval(values), mean_interval(copied, keys), mean_interval(copied)
    assert (clustered.low, clustered.high) == pytest.approx((alone.low, alone.high), abs=1e-12)
    assert clustered.n == 300
    assert careless.high - careless.low < 0.5 * (alone.high - alone.low)


def test_one_cluster_is_one_observation():
    assert mean_interval(scores(50), ["same"] * 50).high - mean_interval(scores(50), ["same"] * 50).low > 0.7


def test_clusters_of_unequal_size_weigh_by_their_items():
    values, keys = [1.0, 1.0, 1.0, 0.0], ["a", "a", "a", "b"]
    assert mean_interval(values, keys).mean == 0.75


def test_the_same_seed_gives_the_same_numbers():
    values, other = scores(50), scores(50, 1)
    assert mean_interval(values, seed=5) == mean_interval(values, seed=5) != mean_interval(values, seed=6)
    assert paired(values, other, seed=5) == paired(values, other, seed=5)


@pytest.mark.parametrize(
    ("values", "clusters", "says"),
    [
        ([], None, "no scores"),
        ([0.5, math.nan], None, r"outside \[0, 1\]"),
        ([1.5], None, r"outside \[0, 1\]"),
        ([0.5], ["a", "b"], "1 scores but 2 cluster keys"),
    ],
)
def test_what_is_no_list_of_scores_is_refused(values, clusters, says):
    with pytest.raises(ValueError, match=says):
        mean_interval(values, clusters)


# -- paired tests -----------------------------------------------------------------------------------------------------


def test_right_or_wrong_scores_get_mcnemars_exact_test():
    """10 items only the second gets right, 2 only the first: p = 2 · P(Binomial(12, 1/2) ≤ 2) = 2 · 79 / 4096."""
    a = [0.0] * 10 + [1.0] * 2 + [1.0] * 20 + [0.0] * 8
    b = [1.0] * 10 + [0.0] * 2 + [1.0] * 20 + [0.0] * 8
    found = paired(a, b)
    assert found.p == pytest.approx(158 / 4096)
    assert (found.difference, found.n, found.better, found.worse) == (pytest.approx(0.2), 40, 10, 2)
    assert 0 < found.low < 0.2 < found.high and found.is_real
    assert paired(b, a)[:4] == pytest.approx((-0.2, -found.high, -found.low, found.p), abs=6e-3)


def test_few_items_get_the_exact_sign_flip_test():
    change = np.array([0.3, 0.1, -0.2, 0.25, 0.4, 0.05])
    sums = [abs(np.dot(signs, change)) for signs in itertools.product((-1, 1), repeat=6)]
    expected = np.mean([s >= abs(change.sum()) - 1e-9 for s in sums])
    assert paired([0.5] * 6, 0.5 + change).p == pytest.approx(expected)


def test_many_items_agree_with_the_t_test():
    a = scores(500)
    b = np.clip(a + np.random.default_rng(1).normal(0.012, 0.1, 500), 0, 1)
    expected = scipy_stats.ttest_rel(b, a)
    found, theory = paired(a, b), expected.confidence_interval()
    assert found.p == pytest.approx(expected.pvalue, abs=0.01)
    assert (found.low, found.high) == pytest.approx((theory.low, theory.high), abs=1e-3)


def test_equal_methods_are_found_different_about_one_time_in_twenty():
    times = 1000 if SOAK else 200
    found = [
        paired(right_or_wrong(60, 0.5, 2 * seed), right_or_wrong(60, 0.5, 2 * seed + 1)).is_real
        for seed in range(times)
    ]
    assert 0 < sum(found) <= 0.09 * times


def test_items_without_any_difference_are_no_proof_of_none():
    found = paired([1.0, 0.0] * 50, [1.0, 0.0] * 50)
    assert found.difference == 0 and found.p == 1.0 and not found.is_real
    assert -0.05 < found.low < 0 < found.high < 0.05


def test_a_cluster_flips_as_one():
    """Five corpora, the second method better on all: p = 2 / 2⁵, however many questions each corpus has."""
    a, b, keys = [0.0] * 50, [1.0] * 50, [i // 10 for i in range(50)]
    assert paired(a, b, keys).p == pytest.approx(2 / 32)
    assert paired(a, b).p < 1e-10


def test_pairs_must_belong_to_the_same_items():
    with pytest.raises(ValueError, match="there are 2 and 3"):
        paired([0.0, 1.0], [0.0, 1.0, 1.0])


def test_two_thousand_items_take_a_second_or_two():
    a, b = scores(2_000), scores(2_000, 1)
    start = time.process_time()
    mean_interval(a)
    paired(a, b)
    assert time.process_time() - start < 6  # about 2 on a slow core


# -- the rest ---------------------------------------------------------------------------------------------------------


def test_holms_correction_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_an_item_without_a_cluster_is_alone():
    results = [{"id": "1", "cluster": "a"}, {"id": "2", "cluster": "a"}, {"id": "3", "cluster": "b"}, {"id": "a"}]
    keys = clusters_of(results)
    assert keys[0] == keys[1] and len(set(keys)) == 3


def test_texts():
    assert str(Interval(0.625, 0.5, 0.75, 8)) == "62.5 [50.0, 75.0]"
    assert str(Difference(-0.031, -0.06, 0.002, 0.07, 8, 1, 3)) == "-3.1 [-6.0, +0.2]"
    assert [stats.p_text(p) for p in (0.0004, 0.02, 1.0)] == ["< 0.001", "0.020", "1.000"]
