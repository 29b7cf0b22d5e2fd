"""The chat: history, context, and Ctrl-C that stops an answer and not the program."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import pytest
import torch
from rich.console import Console

import pesc.serving.chat as serving
from checkpoints import tiny_dense
from pesc import craft_checkpoint
from pesc.config import PescConfig
from pesc.serving.chat import Chat, converse, open_chat


@pytest.fixture
def chat(tmp_path: Path) -> Chat:
    folder = craft_checkpoint(
        tiny_dense(tmp_path / "dense"), tmp_path / "crafted", PescConfig(num_experts=4, adapter_dim=8)
    )
    console = Console(file=io.StringIO(), width=80)
    return open_chat(folder, console, max_new_tokens=6, temperature=0.0, system="be brief")


def test_answers_stream_and_join_the_history(chat: Chat) -> None:
    answer = chat.answer("hi")
    assert answer.strip() in chat.console.file.getvalue()
    chat.answer("again")
    assert [m["role"] for m in chat.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert chat.messages[2]["content"] == answer
    chat.clear()
    assert [m["content"] for m in chat.messages] == ["be brief"]


def test_ctrl_c_keeps_what_was_said(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, pieces = serving._Streamer.on_finalized_text, []

    def interrupted(self, text: str, stream_end: bool = False) -> None:
        plain(self, text, stream_end)
        pieces.append(text)
        if len(pieces) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(serving._Streamer, "on_finalized_text", interrupted)
    chat.settings = dataclasses.replace(chat.settings, max_new_tokens=200)
    answer = chat.answer("hi")
    assert len(pieces) <= 4
    assert chat.messages[-1]["content"] == answer
    assert "(stopped)" in chat.console.file.getvalue()


def test_every_wrong_setting_is_named_before_anything_is_loaded() -> None:
    with pytest.raises(ValueError, match=r"max_new_tokens \(0\) must be.*temperature \(-1.0\) must be"):
        open_chat("nowhere at all", Console(), max_new_tokens=0, temperature=-1.0)


def test_a_conversation_beyond_the_context_is_refused_and_not_kept(chat: Chat) -> None:
    with pytest.raises(ValueError, match="longer than the model's context"):
        chat.answer("x" * 600)
    assert len(chat.messages) == 1


def test_reads_a_pipe_to_its_end(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n\n/clear\ntwo\n/exit\nthree\n"))
    converse(chat)
    assert [m["content"] for m in chat.messages if m["role"] == "user"] == ["two"]


def test_a_model_that_computes_nan_is_one_line(tmp_path: Path) -> None:
    chat = open_chat(tiny_dense(tmp_path / "dense"), Console(file=io.StringIO()))
    with torch.no_grad():
        chat.model.get_output_embeddings().weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="dense cannot answer: RuntimeError"):
        chat.answer("hello")
