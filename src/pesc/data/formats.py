"""Formats of rows: each is recognised by its columns and becomes messages."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pesc.data.settings import FormatName
from pesc.data.sources import cut, data_files, read_rows

_ROLES = ("system", "user", "assistant", "tool")
_SHAREGPT_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function": "tool",
}


@dataclass(frozen=True)
class Format:
    """How rows of one kind become messages."""

    name: FormatName
    columns: tuple[set[str], ...]
    """A row with all columns of one of these sets is recognised."""
    read: Callable[[dict[str, Any]], dict[str, Any]]
    """A row to a conversation: `messages`, and `tools` if the row has some; of plain text, `text`."""


def conversation(row: Any, form: str | None = None) -> dict[str, Any]:
    """A row as a conversation, checked.

    Args:
        row: as a file holds it.
        form: name of its format; by default its columns tell.

    Returns:
        `messages`, each with `role` and `content`, and what else the row gives the chat template: `tools`; or `text`,
        which is trained on as it is.

    Raises:
        ValueError: saying what is wrong with the row.
    """
    _refuse_no_object(row)
    found = detect(row) if form is None else next(each for each in FORMATS if each.name == form)
    try:
        read = found.read({key: value for key, value in row.items() if value is not None})
    except KeyError as error:
        raise ValueError(f"no {error.args[0]!r}, which a row of format {found.name} has") from error
    except (TypeError, AttributeError) as error:
        raise ValueError(f"not of the types that a row of format {found.name} has ({error})") from error
    if "text" in read:
        if not isinstance(read["text"], str) or not read["text"].strip():
            raise ValueError("its text must be text, and not empty")
        return read
    return _check(read | _template_arguments(row, read["messages"]))


def rejected_conversation(row: dict[str, Any]) -> dict[str, Any]:
    """A preference pair with its rejected answer, as a conversation.

    Raises:
        ValueError: saying what is wrong with the row.
    """
    return conversation(row | {"chosen": row["rejected"], "rejected": row["chosen"]}, "preference")


def detect(row: Any) -> Format:
    """The format that a row's columns tell.

    Raises:
        ValueError: the row is no object, or its columns tell no format; all are listed.
    """
    _refuse_no_object(row)
    columns = {key for key, value in row.items() if value is not None}
    for each in FORMATS:
        if any(wanted <= columns for wanted in each.columns):
            return each
    known = "; ".join(f"{each.name} ({', '.join(sorted(each.columns[0]))})" for each in FORMATS)
    raise ValueError(f"columns {', '.join(sorted(columns)) or 'none'} tell no format. Known are {known}")


def _refuse_no_object(row: Any) -> None:
    if isinstance(row, ValueError):  # stands in the place of a line that is no JSON
        raise row
    if not isinstance(row, dict):
        raise ValueError(f"a row must be an object, found {type(row).__name__}")


def read_examples(path: Path | str) -> list[dict[str, Any]]:
    """All rows of a source as conversations, in memory; other columns, such as `domain`, are kept.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no row, or listing the first faulty rows with what is wrong.
    """
    examples, faults, count = [], [], 0
    for file in data_files(str(path)):
        for piece in cut(file)[0]:
            for number, row in read_rows(piece):
                count += 1
                try:
                    examples.append(row | conversation(row) if isinstance(row, dict) else conversation(row))
                except ValueError as error:
                    faults.append(f"{file}, row {number}: {error}")
    refuse_faults(faults, count, str(path))
    return examples


def refuse_faults(faults: list[str], rows: int, path: str) -> None:
    """Raise for rows that are no examples, and for a source without any row.

    Raises:
        ValueError: listing the first five.
    """
    if not rows:
        raise ValueError(f"{path} is empty: it must hold rows, such as a JSON object with messages on each line")
    if faults:
        more = f"\n  and {len(faults) - 5} more" if len(faults) > 5 else ""
        listed = "\n  ".join(faults[:5])
        raise ValueError(f"{path}: {len(faults)} of {rows} rows are no examples:\n  {listed}{more}")


def _check(example: dict[str, Any]) -> dict[str, Any]:
    messages = example["messages"]
    if not isinstance(messages, list) or not messages:
        raise ValueError("its messages must be a list, and not empty")
    for message in messages:
        if not isinstance(message, dict) or message.get("role") not in _ROLES:
            raise ValueError(f"a message's role must be one of {', '.join(_ROLES)}")
        if not isinstance(message.get("content"), str | list) and "tool_calls" not in message:
            raise ValueError("a message's content must be text")
    if messages[0]["role"] == "assistant":
        raise ValueError("starts with the assistant, who has nothing to answer")
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError("no message of the assistant, so nothing to train on")
    return example


def _template_arguments(row: dict[str, Any], messages: list[Any]) -> dict[str, Any]:
    """A row's own system message, put first, and its tools."""
    arguments: dict[str, Any] = {}
    system = row.get("system")
    first = messages[0] if isinstance(messages, list) and messages else {}
    if system and isinstance(first, dict) and first.get("role") != "system":
        arguments["messages"] = [{"role": "system", "content": system}, *messages]
    if tools := row.get("tools"):
        arguments["tools"] = json.loads(tools) if isinstance(tools, str) else tools
    return arguments


def _messages(row: dict[str, Any]) -> dict[str, Any]:
    # Parquet gives every message all keys; those without a value are the absent ones.
    messages = row["messages"]
    if isinstance(messages, list):
        messages = [_without_nulls(message) for message in messages]
    return {"messages": messages}


def _without_nulls(message: Any) -> Any:
    return {key: value for key, value in message.items() if value is not None} if isinstance(message, dict) else message


def _sharegpt(row: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [_turn(turn) for turn in row["conversations"]]}


def _turn(turn: dict[str, Any]) -> dict[str, Any]:
    if "role" in turn:  # some files have the other format's keys under this format's column
        return {"role": turn["role"], "content": turn["content"]}
    return {"role": _SHAREGPT_ROLES.get(turn["from"], turn["from"]), "content": turn["value"]}


def _alpaca(row: dict[str, Any]) -> dict[str, Any]:
    prompt = "\n\n".join(part for part in (row["instruction"], row.get("input", "")) if part)
    earlier = [pair for pair in row.get("history", []) if pair]
    return {"messages": _turns([*earlier, (prompt, row["output"])])}


def _turns(pairs: list[Any]) -> list[dict[str, Any]]:
    roles = ("user", "assistant")
    return [{"role": role, "content": text} for pair in pairs for role, text in zip(roles, pair, strict=True)]


_PAIRS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("instruction", "response"),
    ("problem", "solution"),
    ("query", "response"),
    ("question", "answer"),
)
"""Columns of question and answer; Magicoder's and MetaMathQA's are among them."""


def _pair(row: dict[str, Any]) -> dict[str, Any]:
    prompt, answer = next((row[ask], row[say]) for ask, say in _PAIRS if ask in row and say in row)
    return {"messages": _as_messages(prompt, "user") + _as_messages(answer, "assistant")}


def _preference(row: dict[str, Any]) -> dict[str, Any]:
    """The chosen answer; `rejected_conversation` has the other."""
    answer, _ = _as_messages(row["chosen"], "assistant"), row["rejected"]
    if answer and answer[0]["role"] != "assistant":  # the whole conversation, as UltraFeedback has it beside its prompt
        return {"messages": answer}
    prompt: Any = next((row[name] for name in ("prompt", "question", "conversations") if name in row), [])
    return {"messages": _as_messages(prompt, "user") + answer}


def _as_messages(value: Any, role: str) -> list[dict[str, Any]]:
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    turns = value if isinstance(value, list) else [value]
    return [turn if "role" in turn else _turn(turn) for turn in turns]


def _camelidae(row: dict[str, Any]) -> dict[str, Any]:
    system = row.get("instruction")
    start = [{"role": "system", "content": system}] if system else []
    return {"messages": start + _turns([(turn["input"], turn["output"]) for turn in row["conversation"]])}


FORMATS = (
    Format("messages", ({"messages"},), _messages),
    Format("preference", ({"chosen", "rejected"},), _preference),
    Format("sharegpt", ({"conversations"},), _sharegpt),
    Format("camelidae", ({"conversation"},), _camelidae),
    Format("alpaca", ({"instruction", "output"},), _alpaca),
    Format("prompt-completion", tuple(set(pair) for pair in _PAIRS), _pair),
    Format("text", ({"text"},), lambda row: {"text": row["text"]}),
)
