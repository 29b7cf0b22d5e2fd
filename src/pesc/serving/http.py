"""uvicorn's protocol for HTTP, with an end to its patience: by itself it waits for ever for a request's headers."""

from __future__ import annotations

from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol


class Protocol(H11Protocol):
    """Closes a connection whose client does not complete the headers of a request.

    It uses `cycle`, the last request with complete headers (or None), which uvicorn does not document.
    """

    patience = 10.0
    """Seconds after which it looks again."""

    def connection_made(self, transport: Any) -> None:
        """Begin to watch the connection."""
        super().connection_made(transport)
        self._look(self)

    def _look(self, last: object) -> None:
        # An answer in progress is no reason; between answers, uvicorn's own limit of 5 s for silence comes first.
        waits = self.cycle is None or self.cycle.response_complete
        if waits and self.cycle is last:
            self.transport.close()
        elif not self.transport.is_closing():
            self.loop.call_later(self.patience, self._look, self.cycle if waits else self)
