"""transformers' own OpenAI-compatible app around one model that is already in memory.

The app's parts are those of `transformers serve` (tried with transformers 5.19 and 5.23). What is changed in them: the
model is given and pinned; requests are checked before they are worked on; a prompt must fit the context; generation
stops when the client leaves; errors have OpenAI's form. Importing this module needs the extra `serve`.
"""

from __future__ import annotations

import asyncio
import atexit
import hmac
import inspect
import json
import logging
import sys
import time
from collections.abc import AsyncIterator
from contextlib import aclosing, suppress
from types import SimpleNamespace
from typing import Annotated, Any, ClassVar, Literal

import anyio
import torch
from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from jinja2 import TemplateError
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.exceptions import HTTPException as AnyHTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.server import build_server
from transformers.cli.serving.utils import (
    GenerateManager,
    GenerationState,
    _GenerationCancelled,
    get_response_template,
)

ROUTES = {"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/models", "/health"}

logger = logging.getLogger("uvicorn.error")


def build_app(name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, api_key: str | None) -> ASGIApp:
    """The ASGI app that serves one model.

    Args:
        name: the model's only name.
        model: in eval mode, on its device.
        tokenizer: a fast one.
        api_key: what clients must send as a bearer token; None lets everyone in.
    """
    _know_family(model, tokenizer)
    manager, state = _Pinned(name, model, tokenizer), _State()
    kinds = {"chat_handler": _Chat, "completion_handler": _Completion, "response_handler": _Responses}
    # The other handlers differ between releases; their routes are taken out below.
    handlers: dict[str, Any] = {
        name: None for name in inspect.signature(build_server).parameters if name.endswith("_handler")
    }
    handlers |= {name: kind(model_manager=manager, generation_state=state) for name, kind in kinds.items()}
    app = build_server(manager, **handlers, generation_state=state)
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", None) in ROUTES]
    _answer_errors(app)
    served: ASGIApp = _Guard(app, _context(model))
    return served if api_key is None else _RequireKey(served, api_key)


def _know_family(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    # transformers knows by the model type how a family writes tool calls; a crafted model's type is "pesc".
    family = getattr(model.config, "base_model_type", None)
    if family is not None:
        dense = SimpleNamespace(config=SimpleNamespace(model_type=family))
        tokenizer.response_template = get_response_template(tokenizer, dense)


class _Pinned(ModelManager):
    """Holds one model, which nobody can unload or exchange."""

    def __init__(self, name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        self.force_model = name
        self.pinned = model, tokenizer
        self.since = int(time.time())

    @staticmethod
    def process_model_name(model_id: str) -> str:
        return model_id  # no revisions: answers carry the name that was asked for

    def load_model_and_processor(self, *_: Any, **__: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        return self.pinned

    def get_gen_models(self) -> list[dict[str, Any]]:
        return [{"id": self.force_model, "object": "model", "created": self.since, "owned_by": "pesc"}]


class _State(GenerationState):
    def __init__(self) -> None:
        super().__init__()
        self.manager = _Generation()
        # The interpreter must not end while the generating thread, a daemon, is inside torch: that aborts it.
        atexit.register(self.manager.finish)

    def get_manager(self, model_id: str, use_cb: bool = False) -> _Generation:
        return self.manager


class _Generation(GenerateManager):
    """Generates one answer after the other, within the context, and only while someone waits for it."""

    def finish(self) -> None:
        """Wait until nothing is being generated, ten seconds at most."""
        with suppress(TimeoutError):
            self._thread.submit(lambda: None).result(timeout=10)

    def generate_streaming(self, model: Any, processor: Any, inputs: Any, gen_config: Any, **kwargs: Any) -> Any:
        _fit(model, inputs, gen_config)
        return super().generate_streaming(_ForStream(model), processor, inputs, gen_config, **kwargs)

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, **kwargs: Any
    ) -> Any:
        _fit(model, inputs, gen_config)
        gone = _Gone()
        inputs = {**inputs, "stopping_criteria": StoppingCriteriaList([gone])}
        work = asyncio.ensure_future(super().generate_non_streaming(model, processor, inputs, gen_config, **kwargs))
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            gone.now = True
            raise
        except ValueError as error:
            raise HTTPException(400, f"the model cannot generate with these settings: {error}") from error
        except Exception as error:
            raise RuntimeError(f"generation failed: {error}") from error


def _fit(model: Any, inputs: Any, gen_config: Any) -> None:
    context, length = _context(model), inputs["input_ids"].shape[-1]
    if length >= context:
        raise HTTPException(
            400, f"the prompt has {length} tokens and must have fewer than the model's context ({context}): shorten it"
        )
    if length == 0:
        raise HTTPException(400, "the prompt is empty: give the model something to go on")
    gen_config.max_new_tokens = min(gen_config.max_new_tokens, context - length)


def _context(model: Any) -> int:
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize


class _Gone(StoppingCriteria):
    now = False

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        return torch.full(input_ids.shape[:1], self.now, dtype=torch.bool, device=input_ids.device)


class _ForStream:
    """A model whose errors can be pasted into a JSON string, as transformers does with them in streams."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def generate(self, **kwargs: Any) -> None:
        try:
            self.model.generate(**kwargs)
        except _GenerationCancelled:
            raise
        except Exception as error:
            logger.exception("generation failed")
            raise RuntimeError(json.dumps(str(error))[1:-1]) from error


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
            raise HTTPException(400, _problems(error.errors())) from error
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


class _Chat(_Checked, _EndsWithDone, ChatCompletionHandler):
    schema = _ChatRequest


class _Completion(_Checked, _EndsWithDone, CompletionHandler):
    schema = _CompletionRequest


class _Responses(_Checked, ResponseHandler):
    schema = _ResponsesRequest


def _problems(errors: Any) -> str:
    return "; ".join(f"{'.'.join(str(part) for part in error['loc'])}: {error['msg']}" for error in errors)


def _answer_errors(app: FastAPI) -> None:
    async def refused(_: Request, error: Any) -> JSONResponse:
        return _error(error.status_code, str(error.detail))

    async def unreadable(_: Request, error: Any) -> JSONResponse:
        return _error(400, _problems(error.errors()))

    async def failed(_: Request, error: Exception) -> JSONResponse:
        return _error(500, str(error))

    app.add_exception_handler(AnyHTTPException, refused)
    app.add_exception_handler(RequestValidationError, unreadable)
    app.add_exception_handler(Exception, failed)


def _error(status: int, message: str, code: str | None = None) -> JSONResponse:
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": code}}, status)


class _RequireKey:
    """Lets in only requests with the key; /health is for everyone."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self.app = app
        self.key = key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] == "/health" or self._knows(scope):
            return await self.app(scope, receive, send)
        answer = _error(401, "send the server's API key: Authorization: Bearer KEY", "invalid_api_key")
        answer.headers["WWW-Authenticate"] = "Bearer"
        await answer(scope, receive, send)

    def _knows(self, scope: Scope) -> bool:
        scheme, _, key = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(key.strip(), self.key)


class _Guard:
    """Refuses bodies beyond any prompt that fits, and cancels the work for a client that has left."""

    def __init__(self, app: ASGIApp, context: int) -> None:
        self.app = app
        # Far more than tokens need, escapes and tools included: beyond it, even tokenizing could eat the memory.
        self.limit = 2**20 + 32 * context

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        messages: asyncio.Queue[Message] = asyncio.Queue()

        async def watch() -> None:
            size = 0
            while (message := await receive())["type"] == "http.request":
                size += len(message.get("body", b""))
                if size <= self.limit:
                    messages.put_nowait(message)
                elif not message.get("more_body"):
                    # Only now: a client that is still sending would not see the answer.
                    await _error(413, f"the request has {size} bytes; at most {self.limit} fit")(scope, receive, send)
                    break
            work.cancel_scope.cancel()

        with suppress(asyncio.CancelledError):  # when the server stops; uvicorn would log it as a failure
            async with anyio.create_task_group() as work:
                work.start_soon(watch)
                await self.app(scope, messages.get, send)
                work.cancel_scope.cancel()
