"""Conversations as tokens, and the label of each token that is trained on."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase

IGNORE_INDEX = -100
"""Label of a token that is not trained on."""


def encode_conversation(
    conversation: dict[str, Any], tokenizer: PreTrainedTokenizerBase
) -> list[tuple[list[int], list[int]]]:
    """Tokens and labels of what `pesc.data.formats.conversation` gives; of plain text, every token but the first.

    Returns:
        (input_ids, labels) of each example, as `encode_messages` does.

    Raises:
        ValueError: as `encode_messages` does.
    """
    if "text" in conversation:
        input_ids = [*tokenizer(conversation["text"])["input_ids"], tokenizer.eos_token_id]
        return [(input_ids, [IGNORE_INDEX, *input_ids[1:]])]
    return encode_messages(conversation["messages"], tokenizer, conversation.get("tools"))


def encode_messages(
    messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, tools: list[Any] | None = None
) -> list[tuple[list[int], list[int]]]:
    """Tokens of one conversation and their labels.

    The conversation is rendered up to and with each assistant turn; the tokens that the turn adds are trained on, its
    end-of-turn token included. A template that only appends gives one example with all turns. Others, as Qwen3's,
    render a turn differently once later ones follow; they give an example for each assistant turn, with the turns
    before it as the model sees them when it answers.

    Returns:
        (input_ids, labels) of each example, of equal length.

    Raises:
        ValueError: when the tokenizer has no chat template, or one that cannot show where an answer begins.
    """
    ends = [index for index, message in enumerate(messages, start=1) if message["role"] == "assistant"]
    answers = [_last_answer(messages[:end], tokenizer, tools) for end in ends]
    complete = answers[-1][0] if len(messages) in ends else render(messages, tokenizer, tools=tools)
    if all(complete.startswith(text.rstrip()) for text, _ in answers):
        return [_label(complete, [span for _, span in answers], tokenizer)]
    return [_label(text, [span], tokenizer) for text, span in answers]


def encode_pair(
    chosen: dict[str, Any], rejected: dict[str, Any], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[int], list[int]]:
    """Tokens of a preference pair: two conversations that differ in their last message alone, an answer.

    Returns:
        What comes before the answers, and each answer with its end-of-turn token.

    Raises:
        ValueError: as `encode_messages` does, or for conversations that are no such pair.
    """
    if chosen["messages"][:-1] != rejected["messages"][:-1]:
        raise ValueError("its chosen and rejected messages must differ in the last one alone")
    prompts, conversations = [], []
    for each in (chosen, rejected):
        if each["messages"][-1]["role"] != "assistant":
            raise ValueError("its chosen and rejected messages must end with the assistant's")
        text, span = _last_answer(each["messages"], tokenizer, each.get("tools"))
        input_ids, labels = _label(text, [span], tokenizer)
        trained = [index for index, label in enumerate(labels) if label != IGNORE_INDEX] or [len(labels)]
        prompts.append(input_ids[: trained[0]])
        conversations.append(input_ids[: trained[-1] + 1])
    # A prompt's last token may hold the beginning of an answer too, and then be another in the other conversation.
    pairs = enumerate(zip(*prompts, strict=False))
    start = next((index for index, (one, other) in pairs if one != other), min(map(len, prompts)))
    return prompts[0][:start], conversations[0][start:], conversations[1][start:]


def _last_answer(
    messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, tools: list[Any] | None
) -> tuple[str, tuple[int, int]]:
    """A conversation that ends with an answer as text, and where in it that answer stands."""
    text = render(messages, tokenizer, tools=tools)
    prompt = render(messages[:-1], tokenizer, tools=tools, add_generation_prompt=True)
    if not text.startswith(prompt):
        raise ValueError(
            "the chat template renders the prompt differently once an answer follows it, so the answer cannot be "
            "located: use a template that starts an answer with its generation prompt"
        )
    if len(text.rstrip()) <= len(prompt) and str(messages[-1].get("content") or "").strip():
        raise ValueError(f"the chat template of {tokenizer.name_or_path} leaves out what the assistant says")
    return text, (len(prompt), len(text.rstrip()))


def _label(text: str, spans: list[tuple[int, int]], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    tokens = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    labels = [
        token if any(start <= first < end for start, end in spans) else IGNORE_INDEX
        for token, (first, _) in zip(tokens["input_ids"], tokens["offset_mapping"], strict=True)
    ]
    return list(tokens["input_ids"]), labels


def render(messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, **kwargs: Any) -> str:
    """A conversation as text, by the tokenizer's chat template.

    Raises:
        ValueError: when there is no template, or none for these roles.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            f"the tokenizer of {tokenizer.name_or_path} has no chat template: choose one in the recipe "
            "(data.chat_template=chatml or camelidae), or put a chat_template.jinja into the model's folder"
        )
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **kwargs))
    except Exception as error:  # a template is a program, and fails in its own ways
        roles = ", ".join(message["role"] for message in messages)
        raise ValueError(
            f"the chat template of {tokenizer.name_or_path} cannot render the roles {roles}: "
            f"{type(error).__name__}: {error}"
        ) from error
