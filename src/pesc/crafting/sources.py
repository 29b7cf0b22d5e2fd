"""Where a model comes from: a folder, a hub, or the embedded default."""

from __future__ import annotations

from pathlib import Path

from pesc.crafting.embedded import EMBEDDED, embedded_folder
from pesc.storage.hub import download


def resolve(model: str | Path, *, pickled: bool = False) -> Path:
    """The folder of a model.

    Args:
        model: a folder; a hub id, which is downloaded; or `EMBEDDED`, the model that `make setup` installs.
        pickled: of a hub model without safetensors, download the `.bin` files.

    Raises:
        FileNotFoundError: there is no such folder, nor a hub model of that name within reach.
    """
    if str(model) == EMBEDDED:
        return embedded_folder()
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise FileNotFoundError(f"{model} is a file: give the model's folder")
    way_out = f"give a folder with a config.json, a hub id such as org/name, or {EMBEDDED!r}"
    return download(str(model), way_out, pickled=pickled)
