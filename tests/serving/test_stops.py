"""Stop texts in answers that come in pieces."""

from __future__ import annotations

import random
from typing import Any

from pesc.serving.stops import UntilStop, until_stop


class Reasoning(str):
    """As transformers marks reasoning."""


def test_the_first_stop_text_ends_the_answer() -> None:
    assert until_stop("one, two; three", [";", ","]) == "one"
    assert until_stop("one", [",", "onesie"]) == "one"


def test_pieces_join_to_the_text_before_the_stop_however_it_is_split() -> None:
    rng = random.Random(0)
    for _ in range(2000):
        rest, said = "".join(rng.choices("ab", k=rng.randrange(12))), ""
        stops = ["".join(rng.choices("ab", k=rng.randrange(1, 5))) for _ in range(rng.randrange(1, 4))]
        sent: list[Any] = []
        send = UntilStop(stops, sent.append)
        while rest:
            size = rng.randrange(1, 4)
            send(rest[:size])
            if until_stop(said, stops) == said:  # the first piece that completes a stop text ends the answer
                said += rest[:size]
            rest = rest[size:]
            assert until_stop(said, stops).startswith("".join(sent))
        send(None)
        assert sent.pop() is None
        assert "".join(sent) == until_stop(said, stops)


def test_nothing_is_held_back_without_need_and_kinds_stay_apart() -> None:
    sent: list[Any] = []
    send = UntilStop(["xyz"], sent.append)
    for piece in (Reasoning("ax"), "yz", 7, "bxy", None):
        send(piece)
    assert [(type(piece), piece) for piece in sent] == [
        (Reasoning, "a"),
        (Reasoning, "x"),
        (str, "yz"),
        (int, 7),
        (str, "b"),
        (str, "xy"),
        (type(None), None),
    ]
