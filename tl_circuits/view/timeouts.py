"""How long the server waits for others: for requests that never end, and before it answers a wrong token."""

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

SECONDS_FOR_HEAD = 20.0  # from the first byte of a request, or from the connection, to the end of its headers
SECONDS_FOR_BODY = 30.0
SECONDS_FOR_GUESS = 0.25  # between two answers to wrong tokens, whoever asks
MOST_GUESSES_WAITING = 100


class ImpatientProtocol(H11Protocol):
    """uvicorn's HTTP, which closes a connection whose request does not become whole in time.

    uvicorn itself waits for ever for the rest of a request's headers, so connections that were opened and left would
    stay until the server has no more of them to give.
    """

    _waiting: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def _watch(self) -> None:
        between = self.cycle is None or self.cycle.response_complete  # no request is being answered
        if not between:
            self._stop_waiting()
        elif self._waiting is None:
            self._waiting = self.loop.call_later(SECONDS_FOR_HEAD, self._give_up)

    def _give_up(self) -> None:
        self._waiting = None
        taken_over = self.transport.get_protocol() is not self  # by a websocket
        between = self.cycle is None or self.cycle.response_complete
        if between and not taken_over and not self.transport.is_closing():
            self.transport.close()

    def _stop_waiting(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None


class Guesses:
    """A line in which requests with a wrong token wait for their answer. Requests with the right one pass it by."""

    def __init__(self) -> None:
        self._line = asyncio.Lock()
        self._waiting = 0

    async def wait(self) -> bool:
        """Wait until this request may be told that its token is wrong; False, at once, if too many wait already."""
        if self._waiting >= MOST_GUESSES_WAITING:
            return False
        self._waiting += 1
        try:
            async with self._line:
                await asyncio.sleep(SECONDS_FOR_GUESS)
        finally:
            self._waiting -= 1
        return True
