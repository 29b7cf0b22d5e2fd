"""transformers' own server around one model that is in memory.

`transformers serve` cannot be used from outside alone. It loads the model by itself, without our checks and without
adapters; it takes prompts beyond the context (18,000 tokens kept a model of 8,192 busy for five minutes); it finishes
answers that nobody waits for any more; and it sets a seed when a request arrives, not when its answer begins. The
remedies use parts of it that no documentation promises; docs/extend/versions.md lists them with their tests.
"""

from __future__ import annotations

import asyncio
import atexit
import inspect
import logging
import re
import time
from contextlib import suppress
from typing import Any

import torch
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from jinja2 import TemplateError
from starlette.exceptions import HTTPException
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteriaList
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.server import build_server
from transformers.cli.serving.utils import GenerateManager, GenerationState

from pesc.serving import context_length
from pesc.serving.middleware import CLIENT, error_response

logger = logging.getLogger("uvicorn.error")
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
    manager, state, generation = ModelManager(), GenerationState(), _Generation()
    card = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "pesc"}
    manager.force_model = name
    manager.process_model_name = str  # without a revision: answers carry the name that was asked for
    manager.load_model_and_processor = lambda *_, **__: (model, tokenizer)
    manager.get_gen_models = lambda: [card]
    manager.shutdown = generation.finish
    atexit.register(generation.finish)  # a second Ctrl-C skips the shutdown
    state.get_manager = lambda *_, **__: generation
    # The other handlers differ between releases; the guard lets nobody come to them.
    handlers = dict.fromkeys(key for key in inspect.signature(build_server).parameters if key.endswith("_handler"))
    kinds = {"chat": ChatCompletionHandler, "completion": CompletionHandler, "response": ResponseHandler}
    handlers |= {f"{key}_handler": kind(manager, state) for key, kind in kinds.items()}
    app = build_server(manager, **handlers, generation_state=state)

    async def refuse(_: Request, error: Any) -> JSONResponse:
        detail = getattr(error, "detail", f"the request cannot be read: {error!r}")
        if isinstance(error, RequestValidationError):  # that the body is JSON was checked before
            detail = "send the header Content-Type: application/json"
        return error_response(getattr(error, "status_code", 400), str(detail))

    for kind in (HTTPException, *_UNREADABLE):
        app.add_exception_handler(kind, refuse)
    return app


class _Generation(GenerateManager):
    """Generates one answer after the other."""

    ends = False

    def generate_streaming(self, model: Any, processor: Any, inputs: Any, gen_config: Any, **kwargs: Any) -> Any:
        answer = _Answer(self, model, inputs, gen_config)
        return super().generate_streaming(answer, processor, inputs, gen_config, **kwargs)

    def generate_non_streaming(self, model: Any, processor: Any, inputs: Any, gen_config: Any, **kwargs: Any) -> Any:
        answer = _Answer(self, model, inputs, gen_config)
        # Shielded: the thread cannot give its result to a request that was cancelled.
        return asyncio.shield(super().generate_non_streaming(answer, processor, inputs, gen_config, **kwargs))

    def finish(self) -> None:
        """Stop and wait for the thread, a daemon: the interpreter aborts if it ends while a daemon is inside torch."""
        self.ends = True
        with suppress(TimeoutError):
            self.submit(lambda: None).result(timeout=10)


class _Answer:
    """A model that generates for one client: within the context, with the client's seed, and only while it waits.

    Raises:
        HTTPException: 400 for a prompt that is empty or fills the context.
    """

    def __init__(self, generation: _Generation, model: Any, inputs: Any, gen_config: Any) -> None:
        self.generation, self.model, self.client = generation, model, CLIENT.get()
        context, length = context_length(model.config), inputs["input_ids"].shape[-1]
        if not 0 < length < context:
            rule = f"it must have some, and fewer than the model's context ({context})"
            raise HTTPException(400, f"the prompt has {length} tokens: {rule}")
        asked = self.client.request
        wanted = asked.max_completion_tokens or gen_config.max_new_tokens  # transformers 5.19 ignores the first
        gen_config.max_new_tokens = min(wanted, context - length)
        if asked.logit_bias:  # transformers ignores it in /v1/completions
            gen_config.sequence_bias = {(int(token),): bias for token, bias in asked.logit_bias.items()}
        if asked.temperature or (asked.temperature is None and asked.top_p is not None):
            gen_config.do_sample = True  # a model whose own settings are greedy would ignore the temperature

    def generate(self, **kwargs: Any) -> Any:
        """As the model's; called by the generating thread."""
        if self._is_over():
            if "streamer" in kwargs:
                kwargs["streamer"].end()
            return kwargs["input_ids"]
        if self.client.request.seed is not None:
            torch.manual_seed(self.client.request.seed)
        try:
            return self.model.generate(**kwargs, stopping_criteria=StoppingCriteriaList([self._is_over]))
        except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
            status = 400 if isinstance(error, ValueError) else 500  # generate() checks its settings so
            if status == 500:
                logger.exception("generation failed")
            # In streams, transformers pastes the message into a JSON string.
            raise HTTPException(status, re.sub(r'[\s"\\]+', " ", f"generation failed: {error}")) from error

    def _is_over(self, *_: Any, **__: Any) -> bool:
        return self.generation.ends or self.client.left.is_set()
