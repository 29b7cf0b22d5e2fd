"""Formats of rows: recognised by their columns, checked, nothing dropped in silence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pesc.data.formats import conversation, detect, read_examples, rejected_conversation

USER, ANSWER = {"role": "user", "content": "one?"}, {"role": "assistant", "content": "yes"}
SYSTEM = {"role": "system", "content": "be brief"}
CALL = {"name": "clock"}

ROWS: list[tuple[str, dict[str, Any], list[dict[str, Any]]]] = [
    ("messages", {"messages": [USER, ANSWER]}, [USER, ANSWER]),
    ("messages", {"messages": [USER, ANSWER | {"thinking": None}], "system": "be brief"}, [SYSTEM, USER, ANSWER]),
    (
        "sharegpt",
        {"conversations": [{"from": "human", "value": "one?"}, {"from": "gpt", "value": "yes"}], "system": "be brief"},
        [SYSTEM, USER, ANSWER],
    ),
    ("sharegpt", {"conversations": [{"from": "system", "value": "be brief"}, USER, ANSWER]}, [SYSTEM, USER, ANSWER]),
    ("alpaca", {"instruction": "one?", "input": "", "output": "yes"}, [USER, ANSWER]),
    (
        "alpaca",
        {"instruction": "add", "input": "1 2", "output": "3", "history": [["one?", "yes"]]},
        [USER, ANSWER, {"role": "user", "content": "add\n\n1 2"}, {"role": "assistant", "content": "3"}],
    ),
    ("prompt-completion", {"prompt": "one?", "completion": "yes"}, [USER, ANSWER]),
    ("prompt-completion", {"prompt": [SYSTEM, USER], "completion": [ANSWER]}, [SYSTEM, USER, ANSWER]),
    ("prompt-completion", {"problem": "one?", "solution": "yes", "lang": "py"}, [USER, ANSWER]),
    ("prompt-completion", {"query": "one?", "response": "yes", "type": "GSM"}, [USER, ANSWER]),
    ("preference", {"prompt": "one?", "chosen": "yes", "rejected": "no"}, [USER, ANSWER]),
    ("preference", {"chosen": [USER, ANSWER], "rejected": [USER, USER]}, [USER, ANSWER]),
    ("preference", {"prompt": "one?", "chosen": [USER, ANSWER], "rejected": [USER, ANSWER]}, [USER, ANSWER]),
    ("preference", {"system": "be brief", "question": "one?", "chosen": "yes", "rejected": ""}, [SYSTEM, USER, ANSWER]),
    (
        "preference",
        {
            "conversations": [{"from": "human", "value": "one?"}],
            "chosen": {"from": "gpt", "value": "yes"},
            "rejected": {"from": "gpt", "value": "no"},
        },
        [USER, ANSWER],
    ),
    (
        "camelidae",
        {"instruction": "be brief", "conversation": [{"input": "one?", "output": "yes"}], "dataset": "slimorca"},
        [SYSTEM, USER, ANSWER],
    ),
]


@pytest.mark.parametrize(("name", "row", "messages"), ROWS)
def test_every_format_is_recognised_and_read(name: str, row: dict[str, Any], messages: list[dict[str, Any]]) -> None:
    assert detect(row).name == name
    assert conversation(row)["messages"] == messages
    assert conversation(row, name)["messages"] == messages


def test_a_pair_has_another_conversation() -> None:
    no = ANSWER | {"content": "no"}
    assert rejected_conversation({"prompt": "one?", "chosen": "yes", "rejected": "no"})["messages"] == [USER, no]
    assert rejected_conversation({"chosen": [USER, ANSWER], "rejected": [USER, no]})["messages"] == [USER, no]
    with pytest.raises(ValueError, match="no 'rejected', which a row of format preference has"):
        conversation({"prompt": "one?", "chosen": "yes"}, "preference")


def test_text_and_tools() -> None:
    assert conversation({"text": "abc"}) == {"text": "abc"}
    row = {"messages": [USER, ANSWER], "tools": json.dumps([CALL])}
    assert conversation(row)["tools"] == conversation(row | {"tools": [CALL]})["tools"] == [CALL]
    called = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": CALL}]}
    assert conversation({"messages": [USER, called]})["messages"][1]["tool_calls"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([], "a row must be an object, found list"),
        ({"foo": 1}, r"columns foo tell no format. Known are messages \(messages\); preference"),
        ({"messages": []}, "messages must be a list, and not empty"),
        ({"messages": [{"role": "bot", "content": ""}]}, "role must be one of"),
        ({"messages": [{"role": "user", "content": 3}]}, "content must be text"),
        ({"messages": [ANSWER]}, "starts with the assistant"),
        ({"messages": [USER]}, "no message of the assistant"),
        ({"conversations": [{"from": "human"}]}, "no 'value', which a row of format sharegpt has"),
        ({"conversations": 3}, "not of the types that a row of format sharegpt has"),
        ({"text": " "}, "must be text, and not empty"),
        ({"text": 3}, "must be text, and not empty"),
        ({"messages": [USER, ANSWER], "tools": "{"}, "Expecting"),
    ],
)
def test_what_is_wrong_with_a_row_is_said(row: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        conversation(row)


def test_a_format_that_was_chosen_is_not_guessed() -> None:
    row = {"messages": [USER, ANSWER], "text": "abc"}
    assert "messages" in conversation(row)
    assert conversation(row, "text") == {"text": "abc"}


def test_faulty_rows_are_listed_and_other_columns_kept(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"messages": [USER, ANSWER], "domain": "x"}) + "\n")
    assert read_examples(path)[0]["domain"] == "x"
    with path.open("a") as stream:
        stream.write('{\n{"text": ""}\n')
    with pytest.raises(ValueError, match=r"2 of 3 rows are no examples:\n .*data.jsonl, row 2: not JSON"):
        read_examples(path)
    path.write_text("\n")
    with pytest.raises(ValueError, match="is empty"):
        read_examples(path)
