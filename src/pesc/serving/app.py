"""transformers' own server around one model that is in memory.

`transformers serve` cannot be used from outside alone. It loads the model by itself, without our checks and without
adapters; it takes prompts beyond the context (18,000 tokens kept a model of 8,192 busy for five minutes); it finishes
answers that nobody waits for any more, and one before the next; it sets a seed when a request arrives, not when its
answer begins; and it leaves stop texts in answers. The remedies, here and in generation.py, use parts of it that no
documentation promises; docs/extend/versions.md lists them with their tests.
"""

from __future__ import annotations

import inspect
import time
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from jinja2 import TemplateError
from starlette.exceptions import HTTPException
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.server import build_server
from transformers.cli.serving.utils import GenerationState

from pesc.serving.generation import Generation, places
from pesc.serving.middleware import CLIENT, error_response
from pesc.serving.stops import until_stop

# What reading a request raises, the last from its chat template. Generation raises HTTPException.
_UNREADABLE = (RequestValidationError, LookupError, TypeError, ValueError, AttributeError, TemplateError)


def build_app(name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> FastAPI:
    """The app of `transformers serve`, with one model that nobody can exchange. It belongs behind a `Guard`.

    Args:
        name: the model's only name.
        model: in eval mode, on its device.
        tokenizer: a fast one.
    """
    # By its type, transformers knows how a family writes tool calls.
    model.config.model_type = getattr(model.config, "base_model_type", model.config.model_type)
    manager, state, generation = ModelManager(), GenerationState(), Generation(places(model))
    card = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "pesc"}
    manager.force_model = name
    manager.process_model_name = str  # without a revision: answers carry the name that was asked for
    manager.load_model_and_processor = lambda *_, **__: (model, tokenizer)
    manager.get_gen_models = lambda: [card]
    state.get_manager = lambda *_, **__: generation
    # The other handlers differ between releases; the guard lets nobody come to them.
    handlers = dict.fromkeys(key for key in inspect.signature(build_server).parameters if key.endswith("_handler"))
    kinds = {"chat": _ChatHandler, "completion": CompletionHandler, "response": ResponseHandler}
    handlers |= {f"{key}_handler": kind(manager, state) for key, kind in kinds.items()}
    app = build_server(manager, **handlers, generation_state=state)

    async def refuse(_: Request, error: Any) -> JSONResponse:
        status, detail = getattr(error, "status_code", 400), getattr(error, "detail", f"cannot be read: {error!r}")
        if isinstance(error, RequestValidationError):  # that the body is JSON was checked before
            detail = "send the header Content-Type: application/json"
        # For a field of another path, transformers says 422.
        return error_response(400 if status == 422 else status, str(detail), getattr(error, "headers", None))

    for kind in (HTTPException, *_UNREADABLE):
        app.add_exception_handler(kind, refuse)
    return app


class _ChatHandler(ChatCompletionHandler):
    def _build_completion(self, request_id: str, content: str, *args: Any, **kwargs: Any) -> dict:
        # For families with tool calls, transformers reads the tokens again, and finds the stop text in them.
        stops = CLIENT.get().request.stop or []
        return super()._build_completion(request_id, until_stop(content, stops), *args, **kwargs)
