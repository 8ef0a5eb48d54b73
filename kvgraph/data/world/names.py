"""Invented names of two syllables, in two halves that share every syllable but no name.

A name is a pair of syllables ("Ro" + "mi"), and a quarter of all pairs is held out. Training on the other pairs trains
every syllable, but no held-out name is ever read.
"""

from __future__ import annotations

import random

from kvgraph.errors import KVGraphError

FIRST = tuple((onset + vowel).capitalize() for onset in "b d f g k l m n p r s t v br st".split() for vowel in "aeio")
SECOND = tuple(onset + vowel for onset in "b d f k l m n p r s t v br dr fl kl pr sh st tr".split() for vowel in "aiu")
HELD_OUT = 4  # one pair in this many
MOST = len(SECOND) * (HELD_OUT - 1) // HELD_OUT  # names that can always be dealt from either half

TRAIN, HELD_OUT_SPLIT = SPLITS = ("train", "held-out")


class NamesError(KVGraphError, ValueError):
    """There aren't enough syllables for the names asked for."""


def split_of(first: int, second: int) -> str:
    """The half that the pair of these syllables, by their numbers, belongs to."""
    return HELD_OUT_SPLIT if (first + second) % HELD_OUT == 0 else TRAIN


def names(split: str) -> list[str]:
    """Every name of a half."""
    pairs = ((i, j) for i in range(len(FIRST)) for j in range(len(SECOND)))
    return [FIRST[i] + SECOND[j] for i, j in pairs if split_of(i, j) == split]


class Dealer:
    """Deals names of one half. No two share a syllable, so each syllable says which of the names it belongs to."""

    def __init__(self, split: str):
        self.split = split
        self._first, self._second = set(range(len(FIRST))), set(range(len(SECOND)))

    def deal(self, rng: random.Random, count: int) -> list[str]:
        """`count` more names. Raises NamesError beyond MOST in all."""
        if count + len(FIRST) - len(self._first) > MOST:
            raise NamesError(f"there are syllables for only {MOST} names at once; {count} more don't fit")
        return [self._one(rng) for _ in range(count)]

    def _one(self, rng: random.Random) -> str:
        first = rng.choice(sorted(self._first))
        second = rng.choice([j for j in sorted(self._second) if split_of(first, j) == self.split])
        self._first.remove(first)
        self._second.remove(second)
        return FIRST[first] + SECOND[second]
