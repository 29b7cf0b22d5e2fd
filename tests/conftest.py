"""What all tests share."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

# No test reaches a hub, and none may wait for one.
os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def _prepared_data(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what tests prepare out of the user's cache."""
    monkeypatch.setattr("pesc.data.prepare.cache_folder", lambda: tmp_path_factory.getbasetemp() / "cache")


@pytest.fixture(autouse=True)
def _seed() -> None:
    import torch

    torch.manual_seed(0)
