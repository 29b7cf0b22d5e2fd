"""A run's adapter on a model hub."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from pesc.crafting.load import locate
from pesc.interop.card import write_card
from pesc.interop.formats import export
from pesc.storage.hub import upload


def push_adapter(run: Path, name: str) -> str:
    """Upload a run's adapter with a model card; what the hub has already is not sent again.

    Args:
        run: complete.
        name: hub id of the repository.

    Returns:
        The repository's address.

    Raises:
        FileNotFoundError, ValueError: as `export` does.
        OSError: the hub did not take it.
    """
    with TemporaryDirectory() as place:
        folder = export(run, Path(place) / name.rpartition("/")[2], "adapter")
        write_card(folder, locate(run))
        return upload(folder, name)
