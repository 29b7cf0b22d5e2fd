"""Keeps other libraries' progress bars and notices out of ours."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import datasets
from transformers.utils import logging as transformers_logging

_TALKATIVE = ("trl", "bitsandbytes", "transformers")


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Inside the block, other libraries show errors only: their notices would tear a progress bar apart."""
    bars = transformers_logging.is_progress_bar_enabled()
    verbosity = transformers_logging.get_verbosity()
    data_bars = datasets.are_progress_bars_disabled()
    levels = {name: logging.getLogger(name).level for name in _TALKATIVE}
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    for name in levels:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        transformers_logging.set_verbosity(verbosity)
        if not data_bars:
            datasets.enable_progress_bars()
        if bars:
            transformers_logging.enable_progress_bar()
