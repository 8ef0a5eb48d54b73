"""How certain a mean score is, and whether two methods really differ: bootstrap intervals and paired tests.

Scores are numbers in [0, 1], one per item; as text they are points from 0 to 100. Items that share something form a
*cluster*. Clusters are resampled or flipped as a whole, because ten questions over the same documents tell less than
ten over different ones. Everything is deterministic: the same scores and seed give the same numbers.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
ALPHA = 0.05  # a difference counts as more than noise if p is below this
RESAMPLES = 9999
BATCH = 256  # resamples in memory at once; for 10,000 items draws and scores need 20 MB each
Z = float(stats.norm.ppf((1 + CONFIDENCE) / 2))


class Interval(NamedTuple):
    """A mean with its 95 % confidence interval [low, high], over n items."""

    mean: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{100 * self.mean:.1f} [{100 * self.low:.1f}, {100 * self.high:.1f}]"


class Difference(NamedTuple):
    """How much b's mean is above a's on the same n items: 95 % interval, p-value, and items that b won and lost."""

    difference: float
    low: float
    high: float
    p: float
    n: int
    better: int
    worse: int

    @property
    def is_real(self) -> bool:
        """Whether it is more than noise: p below 0.05."""
        return self.p < ALPHA

    def __str__(self) -> str:
        return f"{100 * self.difference:+.1f} [{100 * self.low:+.1f}, {100 * self.high:+.1f}]"


def p_text(p: float) -> str:
    """A p-value as tables show it."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def mean_interval(values: Sequence[float], clusters: Sequence[Hashable] | None = None, *, seed: int = 0) -> Interval:
    """The mean of scores in [0, 1] with a bootstrap interval (BCa: Efron, 1987). clusters: one key per value.

    Without spread (one cluster, or all clusters equal) a bootstrap interval would have width 0, as if 5 right answers
    out of 5 proved that wrong ones can't occur. In that case the interval covers a share of z² / (n + z²) unseen cases
    (Wilson's bound for an event that never occurred in n cases). For scores that are all 0 or all 1 it is Wilson's.

    Raises ValueError for no values, values outside [0, 1] (including NaN), or a wrong number of clusters.
    """
    scores = _scores(values)
    low, high = _interval(scores, clusters, (0.0, 1.0), seed)
    return Interval(float(scores.mean()), low, high, len(scores))


def paired(
    a: Sequence[float], b: Sequence[float], clusters: Sequence[Hashable] | None = None, *, seed: int = 0
) -> Difference:
    """Compare two methods' scores on the same items, in the same order: mean(b) - mean(a), its interval and p-value.

    The test flips the signs of the items' (or clusters') differences: if the methods were equal, both signs would be
    equally likely. It is exact if that can be computed, which is for few items, and for differences of one size, as of
    right-or-wrong scores (McNemar's exact test). Otherwise it uses 9,999 random flips. p is two-sided.

    Raises ValueError as `mean_interval` does, and if a and b have different lengths.
    """
    first, second = _scores(a), _scores(b)
    if len(first) != len(second):
        raise ValueError(f"paired scores must be of the same items, but there are {len(first)} and {len(second)}")
    change = second - first
    low, high = _interval(change, clusters, (-1.0, 1.0), seed)
    p = _sign_flip_p(_sums(change, clusters)[0], seed)
    better, worse = int((change > 0).sum()), int((change < 0).sum())
    return Difference(float(change.mean()), low, high, p, len(change), better, worse)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for multiple tests (Holm, 1979), which bounds the probability of any false positive."""
    order = np.argsort(p_values, kind="stable")
    corrected = np.empty(len(p_values))
    corrected[order] = np.maximum.accumulate([p_values[j] * (len(order) - i) for i, j in enumerate(order)])
    return np.minimum(corrected, 1.0).tolist()


def clusters_of(results: Sequence[Mapping[str, Any]]) -> list[Hashable]:
    """A cluster key for each line of a results file, as the run wrote it; an item without one is its own cluster."""
    return [("cluster", r["cluster"]) if r.get("cluster") else ("item", r["id"]) for r in results]


def _scores(values: Sequence[float]) -> np.ndarray:
    scores = np.asarray(values, dtype=np.float64)
    if scores.ndim != 1 or not len(scores):
        raise ValueError("there are no scores to average")
    if not ((scores >= 0) & (scores <= 1)).all():
        raise ValueError("a score is outside [0, 1]")
    return scores


def _sums(values: np.ndarray, clusters: Sequence[Hashable] | None) -> tuple[np.ndarray, np.ndarray]:
    """(sum, size) of every cluster, in order of first appearance; without clusters every value is its own."""
    if clusters is None:
        return values, np.ones_like(values)
    if len(clusters) != len(values):
        raise ValueError(f"there are {len(values)} scores but {len(clusters)} cluster keys")
    index: dict[Hashable, int] = {}
    of = np.array([index.setdefault(key, len(index)) for key in clusters])
    return np.bincount(of, weights=values), np.bincount(of).astype(np.float64)


def _interval(
    values: np.ndarray, clusters: Sequence[Hashable] | None, bounds: tuple[float, float], seed: int
) -> tuple[float, float]:
    """The 95 % interval of the mean of values that can only lie within `bounds`."""
    sums, sizes = _sums(values, clusters)
    means = sums / sizes
    if np.ptp(means) < 1e-12:
        unseen = Z**2 / (len(means) + Z**2)
        mean = float(means.mean())
        return mean - unseen * (mean - bounds[0]), mean + unseen * (bounds[1] - mean)
    found = stats.bootstrap(
        (sums, sizes),
        lambda s, n, axis: s.sum(axis=axis) / n.sum(axis=axis),
        paired=True,
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=BATCH,
        confidence_level=CONFIDENCE,
        method="BCa",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(found.low), float(found.high)


def _sign_flip_p(differences: np.ndarray, seed: int) -> float:
    """Two-sided p-value of the sum of differences, over all flips of their signs. Zeros are left out."""
    sizes = np.abs(differences)
    kept = differences[sizes > 1e-12]
    if not len(kept):
        return 1.0
    if np.ptp(np.abs(kept)) < 1e-12:
        return float(stats.binomtest(int((kept > 0).sum()), len(kept)).pvalue)
    observed = abs(kept.sum()) - 1e-9 * np.abs(kept).sum()  # sums in another order may round differently
    return float(np.mean(np.concatenate([np.abs(signs @ kept) >= observed for signs in _signs(len(kept), seed)])))


def _signs(count: int, seed: int) -> Iterator[np.ndarray]:
    """Batches [patterns, count] of +1 and -1: every pattern if they are few, else the unflipped one and random ones."""
    if 2**count <= RESAMPLES + 1:
        yield 1.0 - 2.0 * (np.arange(2**count)[:, None] >> np.arange(count) & 1)
        return
    yield np.ones((1, count))
    rng = np.random.default_rng(seed)
    for start in range(0, RESAMPLES, BATCH):
        yield rng.choice((-1.0, 1.0), (min(BATCH, RESAMPLES - start), count))
