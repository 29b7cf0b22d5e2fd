"""A model for people (`chat`) and programs (`server`) to talk to."""

import sys
from typing import Any


def context_length(config: Any) -> int:
    """The most tokens of a prompt and its answer together; sys.maxsize for a model without such a limit."""
    return getattr(config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
