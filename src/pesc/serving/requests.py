"""What requests may say, checked before they are worked on, and the handlers of transformers that then answer them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Annotated, Any, ClassVar, Literal

from fastapi import HTTPException
from jinja2 import TemplateError
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.response import ResponseHandler

from pesc.serving.middleware import describe


class _Part(BaseModel):
    model_config = ConfigDict(strict=True)
    type: Literal["text", "input_text", "output_text"]
    text: str


class _Message(BaseModel):
    model_config = ConfigDict(strict=True)
    role: str
    content: str | list[_Part] | None = None


_Text = Annotated[str, Field(min_length=1)]
_Length = Annotated[int, Field(ge=1)]


class _Settings(BaseModel):
    """What every request may say; what transformers' server would silently ignore may only have its neutral value."""

    model_config = ConfigDict(strict=True)
    model: str | None = None
    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    stop: _Text | list[_Text] | None = None
    max_tokens: _Length | None = None
    max_completion_tokens: _Length | None = None
    max_output_tokens: _Length | None = None
    logit_bias: dict[str, float] | None = None
    n: Literal[1] | None = None
    best_of: Literal[1] | None = None
    echo: Literal[False] | None = None
    logprobs: Literal[False] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    response_format: dict[Literal["type"], Literal["text"]] | None = None


class _ChatRequest(_Settings):
    messages: Annotated[list[_Message], Field(min_length=1)]


class _CompletionRequest(_Settings):
    prompt: str


class _ResponsesRequest(_Settings):
    input: str | Annotated[list[dict[str, Any]], Field(min_length=1)]


class _Checked:
    """Goes in front of one of transformers' request handlers."""

    schema: ClassVar[type[_Settings]]

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        try:
            return await super().handle_request(body, request_id)  # type: ignore[misc]
        except (LookupError, TypeError, ValueError, AttributeError, TemplateError) as error:
            # Generation's own errors are of other kinds: this one came while the request was read.
            raise HTTPException(400, f"the request cannot be read: {type(error).__name__}: {error}") from error

    def _validate_request(self, body: dict[str, Any]) -> None:
        try:
            self.schema.model_validate(body)
        except ValidationError as error:
            raise HTTPException(400, describe(error.errors())) from error
        name = self.model_manager.force_model  # type: ignore[attr-defined]
        if body.get("model") not in (None, name):
            raise HTTPException(404, f"model ({body['model']!r}) is not served here: the only one is {name!r}")
        if "chat_template" in (body.get("chat_template_kwargs") or {}):
            raise HTTPException(400, "chat_template_kwargs must not bring a chat_template: it would run here")
        for key in ("stop", "logit_bias"):
            if not body.get(key):
                body.pop(key, None)  # generate() refuses empty ones
        if "logit_bias" in body:
            body["logit_bias"] = {token: float(bias) for token, bias in body["logit_bias"].items()}
        if body.get("max_completion_tokens") is not None:
            body["max_tokens"] = body.pop("max_completion_tokens")  # older releases know the older name only
        body["stream"] = body.get("stream") or False  # one of the handlers would stream by default
        super()._validate_request(body)  # type: ignore[misc]

    def _build_generation_config(self, body: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        config = super()._build_generation_config(body, *args, **kwargs)  # type: ignore[misc]
        # A temperature means nothing to a model whose own settings are greedy.
        if body.get("temperature") or (body.get("temperature") is None and body.get("top_p") is not None):
            config.do_sample = True
        return config


class _EndsWithDone:
    """Ends streams as OpenAI's do, with the mark that many clients wait for."""

    def _streaming(self, *args: Any, **kwargs: Any) -> Any:
        response = super()._streaming(*args, **kwargs)  # type: ignore[misc]
        response.body_iterator = _then_done(response.body_iterator)
        return response


async def _then_done(events: Any) -> AsyncIterator[str]:
    async with aclosing(events):
        async for event in events:
            yield event
    yield "data: [DONE]\n\n"


class Chat(_Checked, _EndsWithDone, ChatCompletionHandler):
    """/v1/chat/completions."""

    schema = _ChatRequest


class Completion(_Checked, _EndsWithDone, CompletionHandler):
    """/v1/completions."""

    schema = _CompletionRequest


class Responses(_Checked, ResponseHandler):
    """/v1/responses."""

    schema = _ResponsesRequest
