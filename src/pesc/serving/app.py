"""transformers' own OpenAI-compatible app around one model that is already in memory.

The app's parts are those of `transformers serve` (tried with transformers 5.19 and 5.23). What is changed in them: the
model is given and pinned; requests are checked before they are worked on (requests.py); a prompt must fit the context
and generation stops when the client leaves (generation.py); errors have OpenAI's form (middleware.py). Importing this
module needs the extra `serve`.
"""

from __future__ import annotations

import inspect
import time
from types import SimpleNamespace
from typing import Any

from starlette.types import ASGIApp
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.server import build_server
from transformers.cli.serving.utils import get_response_template

from pesc.serving.generation import State, context_length
from pesc.serving.middleware import Guard, RequireKey, answer_errors
from pesc.serving.requests import Chat, Completion, Responses

ROUTES = {"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/models", "/health"}


def build_app(name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, api_key: str | None) -> ASGIApp:
    """The ASGI app that serves one model.

    Args:
        name: the model's only name.
        model: in eval mode, on its device.
        tokenizer: a fast one.
        api_key: what clients must send as a bearer token; None lets everyone in.
    """
    _know_family(model, tokenizer)
    manager, state = _Pinned(name, model, tokenizer), State()
    kinds = {"chat_handler": Chat, "completion_handler": Completion, "response_handler": Responses}
    # The other handlers differ between releases; their routes are taken out below.
    handlers: dict[str, Any] = {
        name: None for name in inspect.signature(build_server).parameters if name.endswith("_handler")
    }
    handlers |= {name: kind(model_manager=manager, generation_state=state) for name, kind in kinds.items()}
    app = build_server(manager, **handlers, generation_state=state)
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", None) in ROUTES]
    answer_errors(app)
    served: ASGIApp = Guard(app, context_length(model))
    return served if api_key is None else RequireKey(served, api_key)


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
