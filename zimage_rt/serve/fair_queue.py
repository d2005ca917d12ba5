"""Jobs that wait, fairly: clients take turns, and each client's own jobs keep their order."""

from collections import deque
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class FairQueue(Generic[T]):
    """A queue with a lane for each client. The lane that was served goes to the end of the line."""

    def __init__(self) -> None:
        self._lanes: dict[str, deque[T]] = {}  # in the order in which they are served

    def __len__(self) -> int:
        return sum(map(len, self._lanes.values()))

    def __iter__(self) -> Iterator[T]:
        """All that waits, in the order in which it would be taken if nothing else came."""
        rounds = max(map(len, self._lanes.values()), default=0)
        for turn in range(rounds):
            yield from (lane[turn] for lane in self._lanes.values() if turn < len(lane))

    def put(self, lane: str, item: T) -> None:
        """Adds to the end of a client's lane."""
        self._lanes.setdefault(lane, deque()).append(item)

    def put_first(self, lane: str, item: T) -> None:
        """Puts back what was taken, before all that waits."""
        self._lanes = {lane: deque([item, *self._lanes.pop(lane, ())]), **self._lanes}

    def take(self) -> T | None:
        """The next one; None where nothing waits."""
        for name in self._lanes:
            lane = self._lanes.pop(name)
            item = lane.popleft()
            if lane:
                self._lanes[name] = lane
            return item
        return None

    def remove(self, item: T) -> bool:
        """Takes one out. False if it does not wait here."""
        for name, lane in self._lanes.items():
            if item in lane:
                lane.remove(item)
                if not lane:
                    del self._lanes[name]
                return True
        return False
