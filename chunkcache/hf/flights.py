"""Single flight: of several requests that need the same prefix at once, one computes it."""

from __future__ import annotations

from threading import Condition

from chunkcache.tree import TOKEN_BYTES, common_prefix, pack


class Flight:
    """A prefill in progress."""

    __slots__ = ("namespace", "tokens")

    def __init__(self, namespace: bytes, tokens: list[int]):
        self.namespace = namespace
        self.tokens = pack(tokens)


class Flights:
    """All prefills in progress in one wrapper."""

    def __init__(self, chunk_size: int):
        self._chunk_size = chunk_size
        self._running: list[Flight] = []
        self._landed = Condition()

    def wait_or_start(self, namespace: bytes, tokens: list[int], stored: int) -> Flight | None:
        """Starts a flight for `tokens`, of which `stored` are found already; or waits and gives None.

        It waits while another flight will add at least one chunk that these tokens share; the caller
        then looks the prefix up again. A caller runs one flight at a time, so nobody waits in a ring.
        """
        with self._landed:
            other = next(
                (f for f in self._running if self._helps(f, namespace, tokens, stored)), None
            )
            if other is None:
                flight = Flight(namespace, tokens)
                self._running.append(flight)
                return flight
            self._landed.wait_for(lambda: other not in self._running)
            return None

    def start_alone(self, namespace: bytes, tokens: list[int], stored: int) -> Flight | None:
        """As `wait_or_start`, but does not wait: None if another flight is on the way."""
        with self._landed:
            if any(self._helps(flight, namespace, tokens, stored) for flight in self._running):
                return None
            self._running.append(flight := Flight(namespace, tokens))
            return flight

    def _helps(self, flight: Flight, namespace: bytes, tokens: list[int], stored: int) -> bool:
        if flight.namespace != namespace:
            return False
        limit = min(len(flight.tokens) // TOKEN_BYTES, len(tokens) - 1)
        shared = common_prefix(flight.tokens, 0, pack(tokens), 0, limit)
        return shared // self._chunk_size > stored // self._chunk_size

    def land(self, flight: Flight) -> None:
        """The flight's chunks are stored, or will not be; waiting requests go on."""
        with self._landed:
            if flight in self._running:
                self._running.remove(flight)
                self._landed.notify_all()
