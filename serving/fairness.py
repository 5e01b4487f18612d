"""A fair queue: whose request is next, when many keys share an engine with so many places and so many tokens.

Start-time fair queueing (Goyal, Vin and Cheng, 1996) over keys of equal weight, in tokens. Each key has a virtual time:
the tokens it has had. The key with the smallest is next, and one that comes back from a pause begins at the virtual
time of the others, so that pauses earn nothing. Of a request that is let in, the part of its tokens counts that the
key's last requests took of theirs; once it has ended, what it really took.

Turns alone do not spare a quiet key the wait for a place when another key holds them all. So where several keys exist,
a share of places and tokens is kept for keys that run little.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

KEPT_PART = 8
"""one in so many places and tokens is kept for keys that hold fewer places than are kept"""
_NEWEST_WEIGHT = 0.2
"""of the last request, in what is expected of a key's next one"""
_SPARE_ENTRIES = 64


@dataclass(slots=True, eq=False)
class Ticket:
    """A request: the most tokens it may take, prompt included, and when it came."""

    key: str
    tokens: int
    arrived: float
    charged: float = 0.0
    """what its key's virtual time rose by when it was let in"""
    admitted: bool = False
    ended: bool = False


@dataclass(slots=True, eq=False)
class _Line:
    """One key's requests, and where it stands."""

    key: str
    virtual: float
    floor: float
    """no refund takes the virtual time below this: it is the time at which the line last joined the others"""
    share: float = 1.0
    """what its requests took of the tokens that they might have taken, the recent ones weighing most"""
    running: int = 0
    entry: int = 0
    """number of the line's valid entry in the heaps; others are stale"""
    waiting: OrderedDict[Ticket, None] = field(default_factory=OrderedDict)


_Heap = list[tuple[float, int, _Line]]


class FairQueue:
    """Requests that wait and requests that run. Every call is O(log keys); nothing here knows of time or tasks.

    Args:
        places: requests that may run at a time.
        tokens: tokens that those may take together.
        keys: how many keys there are; with more than one, places and tokens are kept for keys that run little.
    """

    def __init__(self, places: int, tokens: int, keys: Callable[[], int] = lambda: 1) -> None:
        self.places = places
        self.tokens = tokens
        self.running = 0
        self.waiting = 0
        self.running_tokens = 0
        self.waiting_tokens = 0
        self._keys = keys
        self._kept = max(1, places // KEPT_PART) if places > 1 else 0
        self._virtual = 0.0
        self._entries = 0
        self._lines: dict[str, _Line] = {}
        self._light: _Heap = []  # lines that wait and hold fewer places than are kept
        self._busy: _Heap = []  # the others that wait
        self._arrivals: OrderedDict[Ticket, None] = OrderedDict()
        self._lengths: dict[int, OrderedDict[str, None]] = {}  # keys by how many of their requests wait
        self._longest = 0

    def push(self, ticket: Ticket) -> None:
        """Let a request wait behind the others of its key."""
        line = self._lines.get(ticket.key)
        if line is None:
            line = self._lines[ticket.key] = _Line(ticket.key, self._virtual, self._virtual)
        if not line.waiting and line.virtual < self._virtual:
            line.virtual = line.floor = self._virtual
        line.waiting[ticket] = None
        self._arrivals[ticket] = None
        self.waiting += 1
        self.waiting_tokens += ticket.tokens
        self._move(line, len(line.waiting) - 1)
        if len(line.waiting) == 1:
            self._enter(line)

    def remove(self, ticket: Ticket) -> None:
        """Take a waiting request out."""
        line = self._lines[ticket.key]
        del line.waiting[ticket], self._arrivals[ticket]
        self.waiting -= 1
        self.waiting_tokens -= ticket.tokens
        self._move(line, len(line.waiting) + 1)
        if not line.waiting:
            line.entry = 0
            self._forget(line)

    def admit(self) -> Ticket | None:
        """Take out the request whose turn it is, if there is room for it. It counts as running until `release`."""
        light, busy = _top(self._light), _top(self._busy)
        if busy is not None and (light is None or busy.virtual <= light.virtual):
            # Where only the kept share is left, it is there for the light ones.
            line = busy if self._fits(busy) else light
        else:
            line = light
        if line is None or not self._fits(line):
            return None
        ticket = next(iter(line.waiting))
        self._virtual = max(self._virtual, line.virtual)
        ticket.charged = line.share * ticket.tokens
        line.virtual += ticket.charged
        line.running += 1
        self.running += 1
        self.running_tokens += ticket.tokens
        self.remove(ticket)
        if line.waiting:
            self._enter(line)
        ticket.admitted = True
        return ticket

    def release(self, ticket: Ticket, used: int) -> None:
        """A running request has ended, and took `used` tokens, prompt included. A second call does nothing."""
        if ticket.ended:
            return
        ticket.ended = True
        line = self._lines[ticket.key]
        line.virtual = max(line.floor, line.virtual - ticket.charged + used)
        line.share += _NEWEST_WEIGHT * (min(1.0, used / ticket.tokens) - line.share)
        line.running -= 1
        self.running -= 1
        self.running_tokens -= ticket.tokens
        if line.waiting:
            self._enter(line)
        else:
            self._forget(line)

    def surplus(self, key: str) -> Ticket:
        """Who has to go when too many wait: the newest request of the key with the most of them, `key` among equals."""
        longest = self._lengths[self._longest]
        line = self._lines[key if key in longest else next(iter(longest))]
        return next(reversed(line.waiting))

    def oldest(self) -> Ticket | None:
        """The request that has waited longest."""
        return next(iter(self._arrivals), None)

    def all_waiting(self) -> list[Ticket]:
        """Every waiting request, the oldest first."""
        return list(self._arrivals)

    def _fits(self, line: _Line) -> bool:
        ticket = next(iter(line.waiting))
        places, tokens = self.places, self.tokens
        if line.running >= self._kept and self._keys() > 1:
            places -= self._kept
            without = tokens - tokens // KEPT_PART
            tokens = without if ticket.tokens <= without else tokens
        return self.running < places and self.running_tokens + ticket.tokens <= tokens

    def _enter(self, line: _Line) -> None:
        """A new entry of a line that waits, where its virtual time and how much it runs put it."""
        self._entries += 1
        line.entry = self._entries
        heap = self._light if line.running < self._kept else self._busy
        if len(heap) > 2 * len(self._lines) + _SPARE_ENTRIES:
            heap[:] = [entry for entry in heap if entry[1] == entry[2].entry]
            heapq.heapify(heap)
        heapq.heappush(heap, (line.virtual, line.entry, line))

    def _move(self, line: _Line, before: int) -> None:
        """Note a line's new length, which differs from `before` by one."""
        after = len(line.waiting)
        if before:
            keys = self._lengths[before]
            del keys[line.key]
            if not keys:
                del self._lengths[before]
        if after:
            self._lengths.setdefault(after, OrderedDict())[line.key] = None
        if after > self._longest or self._longest not in self._lengths:
            self._longest = after

    def _forget(self, line: _Line) -> None:
        """Drop a line that has nothing left and owes nothing; all of them once nobody competes."""
        if not self.running and not self.waiting:
            self._lines.clear()
        elif not line.running and not line.waiting and line.virtual <= self._virtual:
            del self._lines[line.key]


def _top(heap: _Heap) -> _Line | None:
    while heap and heap[0][1] != heap[0][2].entry:
        heapq.heappop(heap)
    return heap[0][2] if heap else None
