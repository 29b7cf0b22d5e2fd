"""A chat in the terminal: answers stream, the history is kept, and Ctrl-C stops an answer but not the program."""

from __future__ import annotations

import io
import readline  # noqa: F401  (gives input() line editing and recall of earlier lines)
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from pesc.crafting.load import locate
from pesc.crafting.refusals import refused_in_one_line
from pesc.data.chat import render
from pesc.machine.quiet import quiet_libraries
from pesc.rules import Settings, at_least
from pesc.serving import context_length

HELP = "Type a message. Ctrl-C stops an answer; /clear forgets the conversation; /exit or Ctrl-D leaves."


@dataclass(frozen=True, kw_only=True)
class ChatSettings(Settings):
    """How a model answers in a chat.

    Raises:
        ValueError: listing every setting that breaks its rule.
    """

    max_new_tokens: Annotated[int, at_least(1)] = 512
    """The most tokens of an answer."""
    temperature: Annotated[float, at_least(0)] = 0.2
    """Of sampling; 0 always takes the likeliest token."""
    system: str | None = None
    """System message, in place of the chat template's own."""


@dataclass
class Chat:
    """A conversation with a model."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    console: Console
    settings: ChatSettings = ChatSettings()
    messages: list[dict[str, str]] = field(default_factory=list)

    def clear(self) -> None:
        """Forget the conversation."""
        system = self.settings.system
        self.messages = [{"role": "system", "content": system}] if system else []

    def answer(self, text: str) -> str:
        """Answer a message, and show the answer as it comes.

        Returns:
            The answer. If Ctrl-C stopped it, its beginning; the history keeps that too.

        Raises:
            ValueError: the conversation no longer fits the model's context, or the model computes NaN; the message is
                not kept.
        """
        question = {"role": "user", "content": text}
        prompt = render([*self.messages, question], self.tokenizer, add_generation_prompt=True)
        batch = self.tokenizer(prompt, return_tensors="pt", add_special_tokens=False).to(self.model.device)
        room = context_length(self.model.config) - batch["input_ids"].shape[1]
        if room < 1:
            raise ValueError("the conversation is longer than the model's context: /clear forgets it")
        streamer, temperature = _Streamer(self.tokenizer, self.console), self.settings.temperature
        sampling = {"do_sample": True, "temperature": temperature, "top_p": 0.9} if temperature else {}
        try:
            with refused_in_one_line(f"{self.model.config.name_or_path} cannot answer"):
                self.model.generate(
                    **batch,
                    streamer=streamer,
                    max_new_tokens=min(self.settings.max_new_tokens, room),
                    pad_token_id=self.tokenizer.pad_token_id,
                    **(sampling or {"do_sample": False}),
                )
        except KeyboardInterrupt:
            streamer.end()
            self.console.print(" [dim](stopped)[/dim]", end="")
        self.console.print()
        self.messages += [question, {"role": "assistant", "content": streamer.text}]
        return streamer.text


class _Streamer(TextStreamer):
    def __init__(self, tokenizer: PreTrainedTokenizerBase, console: Console) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.console = console
        self.text = ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.text += text
        self.console.print(text, end="", markup=False, highlight=False, soft_wrap=True)


def open_chat(model: str | Path, console: Console, *, base: str | Path | None = None, **settings: Any) -> Chat:
    """Load a model, fold its LoRA, and start a conversation.

    Args:
        model: whatever `pesc.load` takes.
        console: where answers are shown.
        base: as for `pesc.load`.
        settings: the fields of `ChatSettings`.

    Raises:
        FileNotFoundError, ValueError: as `pesc.load` does; also for a tokenizer without chat template, and for a
            setting that breaks its rule.
    """
    checked = ChatSettings(**settings)
    with quiet_libraries():
        ref = locate(model, base=base)
        tokenizer = ref.tokenizer()
        render([{"role": "user", "content": ""}], tokenizer)
        loaded = ref.load(folded=True)
    if torch.cuda.is_available():
        loaded.to("cuda")
    chat = Chat(loaded, tokenizer, console, checked)
    chat.clear()
    return chat


def converse(chat: Chat) -> None:
    """Read messages from the terminal, or from a pipe, until its end."""
    interactive = sys.stdin.isatty()
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    if interactive:
        chat.console.print(HELP, style="dim")
    while True:
        try:
            text = input("\n> " if interactive else "").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            chat.console.print("\n[dim]/exit or Ctrl-D leaves[/dim]")
            continue
        if text == "/exit":
            return
        if text == "/clear":
            chat.clear()
        elif text:
            try:
                chat.answer(text)
            except ValueError as error:
                chat.console.print(str(error), style="red", highlight=False)
