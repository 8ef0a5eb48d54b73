"""Responses that are kept for `previous_response_id`: in memory, in a limited number of bytes for each tenant."""

from __future__ import annotations

import json
from collections import OrderedDict, defaultdict
from dataclasses import dataclass
from typing import Any


@dataclass(eq=False)
class KeptTurn:
    """A response, what was said in it, and the turn it continues.

    messages: JSON of the new messages and of the answer. holders: kept responses and later turns that need it.
    """

    response: bytes
    messages: bytes
    previous: KeptTurn | None
    holders: int = 0

    @property
    def size(self) -> int:
        """Bytes of this turn, without those before it."""
        return len(self.response) + len(self.messages)

    def conversation(self) -> list[dict[str, Any]]:
        """The messages of all turns up to and with this one, in order."""
        turns, turn = [self], self.previous
        while turn is not None:
            turns.append(turn)
            turn = turn.previous
        return [message for turn in reversed(turns) for message in json.loads(turn.messages)]


class Kept:
    """Responses by id, each tenant's own. The event loop's own: nothing here is locked.

    capacity: bytes of JSON for each tenant; the response that nobody asked for longest goes first. A turn that a kept
    response continues stays in memory, and counts, until the last such response goes.
    """

    def __init__(self, capacity: int):
        self.capacity = capacity
        self._turns: defaultdict[str, OrderedDict[str, KeptTurn]] = defaultdict(OrderedDict)
        self._bytes: defaultdict[str, int] = defaultdict(int)

    def size(self, tenant: str) -> int:
        """Bytes kept for a tenant."""
        return self._bytes[tenant]

    def get(self, tenant: str, name: str) -> KeptTurn | None:
        """A tenant's response; None if there is none or it is gone."""
        turns = self._turns[tenant]
        if name in turns:
            turns.move_to_end(name)
        return turns.get(name)

    def put(self, tenant: str, name: str, turn: KeptTurn) -> None:
        """Keep a response, and let others go until all fit; this one too if it alone is too large."""
        turns = self._turns[tenant]
        turns[name] = turn
        self._hold(tenant, turn)
        while self._bytes[tenant] > self.capacity and turns:
            self._release(tenant, turns.popitem(last=False)[1])

    def delete(self, tenant: str, name: str) -> bool:
        """Forget a response. False if there was none."""
        turn = self._turns[tenant].pop(name, None)
        if turn is not None:
            self._release(tenant, turn)
        return turn is not None

    def _hold(self, tenant: str, turn: KeptTurn | None) -> None:
        """Count a turn, and those before it that nothing held: they may have gone while this one was answered."""
        while turn is not None:
            turn.holders += 1
            if turn.holders > 1:
                return
            self._bytes[tenant] += turn.size
            turn = turn.previous

    def _release(self, tenant: str, turn: KeptTurn | None) -> None:
        """Let go of a turn, and of those before it that nothing else holds."""
        while turn is not None:
            turn.holders -= 1
            if turn.holders:
                return
            self._bytes[tenant] -= turn.size
            turn = turn.previous
