"""The cache, installed packages, and downloads from a model hub."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from pesc.storage.checksums import NEEDED, SUMS

_DATA = ["*.json", "*.jsonl", "*.parquet"]
_PICKLED = ["*.json", "*.model", "pytorch_model*.bin"]


def cache_folder(cache: Path | None = None) -> Path:
    """The folder for what is made or fetched once: `cache`, else `$PESC_CACHE`, else `~/.cache/pesc`.

    The folder need not exist yet.
    """
    if cache is not None:
        return Path(cache).expanduser()
    return Path(os.environ.get("PESC_CACHE") or "~/.cache/pesc").expanduser()


def package_folder(package: str, install: str) -> Path:
    """The folder of an installed package, found without importing it.

    Args:
        package: its import name.
        install: the command that installs it, quoted in the error.

    Raises:
        FileNotFoundError: the package is not installed.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"package {package} is missing, but its files are needed: run `{install}`")
    return Path(next(iter(spec.submodule_search_locations)))


def download(model: str, way_out: str, *, pickled: bool = False) -> Path:
    """The local snapshot of a hub model: configs, tokenizer and safetensors.

    Args:
        model: hub id, such as org/name.
        way_out: other valid names, quoted in the error.
        pickled: also take `.bin` files if the model has no safetensors.

    Raises:
        FileNotFoundError: for an invalid id, or one that the hub does not provide.
    """
    folder = _snapshot(model, [*NEEDED, SUMS], way_out, "model")
    if pickled and not any(folder.glob("*.safetensors")):
        folder = _snapshot(model, _PICKLED, way_out, "model")
    return folder


def download_data(dataset: str) -> Path:
    """The local snapshot of a hub dataset: its JSON and Parquet files.

    Raises:
        FileNotFoundError: for an invalid id, or one that the hub does not provide.
    """
    return _snapshot(dataset, _DATA, "give a file, a folder, or a dataset's hub id such as org/name", "dataset")


def upload(folder: Path, name: str) -> str:
    """Put a folder's files into a hub's model repository; one that is not there is made, private.

    Args:
        folder: what to upload.
        name: of the repository, such as org/name.

    Returns:
        The repository's address.

    Raises:
        OSError: the hub did not take it.
    """
    from huggingface_hub import HfApi

    try:
        address = HfApi().create_repo(name, private=True, exist_ok=True)
        HfApi().upload_folder(repo_id=name, folder_path=folder, commit_message="Upload by pesc")
    except Exception as error:  # of the network, the hub, or the one who asks: many classes, as for a download
        raise OSError(f"{name}: the hub did not take it ({str(error).splitlines()[0]})") from error
    return str(address)


def _snapshot(name: str, patterns: list[str], way_out: str, kind: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(name, allow_patterns=patterns, repo_type=kind))
    except HFValidationError as error:
        raise FileNotFoundError(f"{name}: no such folder, and no valid hub id; {way_out}") from error
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise FileNotFoundError(
            f"{name}: no such folder, and the hub did not provide it ({reason}); {way_out}"
        ) from error
