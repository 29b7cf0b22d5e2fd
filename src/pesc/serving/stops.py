"""Stop texts: where an answer ends, and how much of it may already be sent."""

from collections.abc import Callable
from typing import Any


def until_stop(text: str, stops: list[str]) -> str:
    """The text before the first of the stop texts; all of it if it has none."""
    return text[: min((start for stop in stops if (start := text.find(stop)) >= 0), default=None)]


class UntilStop:
    """Passes an answer on up to a stop text, and holds back what may be the beginning of one.

    Args:
        stops: the texts; none is empty.
        send: takes each piece that is certain.
    """

    def __init__(self, stops: list[str], send: Callable[[Any], None]) -> None:
        self.stops, self.send = stops, send
        self.held, self.stopped = "", False

    def __call__(self, piece: Any) -> None:
        """Take the next piece: text, text of another class (reasoning), or what is no text (a tool call, the end)."""
        if self.held and type(piece) is not type(self.held):
            self.send(self.held)
            self.held = ""
        if not isinstance(piece, str):
            self.send(piece)
        elif not self.stopped:
            text = self.held + piece
            certain = until_stop(text, self.stops)
            self.stopped = certain != text
            begun = (n for stop in self.stops for n in range(1, len(stop)) if certain.endswith(stop[:n]))
            end = len(certain) - (0 if self.stopped else max(begun, default=0))
            self.held = type(piece)(certain[end:])
            if end:
                self.send(type(piece)(certain[:end]))
