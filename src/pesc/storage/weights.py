"""Tensors of checkpoints on disk, safetensors or `.bin`: listed without loading, read one at a time."""

from __future__ import annotations

import functools
import hashlib
import pickle
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from pesc.storage.files import read_json, write_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
BIN_SINGLE, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
SHARD_BYTES = 2 * 1024**3
REOPEN_BYTES = 256 * 1024**2
"""After so many bytes read, a safetensors file is opened anew: its pages stay with the process while it is open."""
_FLOATING = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class TensorInfo:
    """A tensor's description, known before it is read."""

    shape: tuple[int, ...]
    dtype: str
    """As torch names it: "bfloat16"."""
    file: Path


class Weights:
    """The tensors of a checkpoint's folder; one file is open at a time.

    Nothing but tensors is ever read: `.bin` files go through torch's restricted unpickler, which runs no
    code.

    Args:
        folder: the checkpoint's.
        files: those to read; by default those that transformers would choose: one file before an index.
        pickled: take `.bin` files if there are no safetensors.

    Raises:
        FileNotFoundError: when there are no weight files, or the index names one that is missing.
        ValueError: for a file that is damaged, truncated, or holds more than tensors, and for an index that is none
            or names files outside the folder.
    """

    def __init__(self, folder: Path, files: list[Path] | None = None, *, pickled: bool = True) -> None:
        self.folder = folder
        self.files, index = _weight_files(folder, pickled=pickled) if files is None else (files, None)
        self.tensors: dict[str, TensorInfo] = {}
        self._open: tuple[Path, Any] | None = None
        self._touched = 0
        for file in self.files:
            for name, info in self._list(file).items():
                if not name.isprintable():
                    raise _damaged(file, f"a tensor is named {name!r}")
                if name in self.tensors:
                    raise ValueError(f"{name} lies in both {self.tensors[name].file} and {file}: one must go")
                self.tensors[name] = info
        if index is not None:
            self._refuse_absent(index)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's shape by name."""
        return {name: info.shape for name, info in self.tensors.items()}

    def not_floating(self, names: Iterable[str]) -> list[str]:
        """A line for each of these tensors that is no floating-point one of 16 bits or more."""
        dtypes = {name: self.tensors[name].dtype for name in sorted(names)}
        return [
            f"wrong dtype: {name} is {dtype}, and must be one of {', '.join(_FLOATING.values())}"
            for name, dtype in dtypes.items()
            if dtype not in _FLOATING.values()
        ]

    @property
    def file_sizes(self) -> list[int]:
        """Bytes of each file."""
        return [file.stat().st_size for file in self.files]

    def read(self, name: str) -> torch.Tensor:
        """One tensor, mapped from its file; only `.bin` files of the oldest format lie whole in memory."""
        file = self.tensors[name].file
        tensors = self._opened(file)
        try:
            tensor = tensors[name] if isinstance(tensors, dict) else tensors.get_tensor(name)
        except SafetensorError as error:
            raise _damaged(file, error) from error
        self._touched += tensor.numel() * tensor.element_size()
        if self._touched > REOPEN_BYTES and not isinstance(tensors, dict):
            self._open = None
        return tensor

    def _refuse_absent(self, index: Path) -> None:
        # What the files hold beyond the index counts too: transformers reads it.
        absent = sorted(_weight_map(index).keys() - self.tensors.keys())
        if absent:
            raise ValueError(f"the files of {self.folder} lack {', '.join(absent[:8])}, named by {index.name}")

    def _list(self, file: Path) -> dict[str, TensorInfo]:
        tensors = self._opened(file)
        if isinstance(tensors, dict):
            return {
                name: TensorInfo(tuple(t.shape), str(t.dtype).removeprefix("torch."), file)
                for name, t in tensors.items()
            }
        found = {}
        for name in tensors.keys():  # noqa: SIM118 (a handle, not a dict)
            part = tensors.get_slice(name)
            dtype = part.get_dtype()
            found[name] = TensorInfo(tuple(part.get_shape()), _FLOATING.get(dtype, dtype.lower()), file)
        return found

    def _opened(self, file: Path) -> Any:
        if self._open is None or self._open[0] != file:
            self._open, self._touched = None, 0  # let go first: a .bin of the oldest format lies whole in memory
            self._open = (file, _load_bin(file) if file.suffix == ".bin" else _open_safetensors(file))
        return self._open[1]


def _weight_files(folder: Path, *, pickled: bool) -> tuple[list[Path], Path | None]:
    """The files that hold a checkpoint's tensors, and their index if they have one, as transformers chooses them."""
    names = (SINGLE, INDEX, BIN_SINGLE, BIN_INDEX) if pickled else (SINGLE, INDEX)
    for path in (folder / name for name in names):
        if path.is_file():
            return (_indexed(path), path) if path.suffix == ".json" else ([path], None)
    if not pickled and any(folder.glob("*.bin")):
        raise FileNotFoundError(
            f"{folder} holds neither {SINGLE} nor {INDEX} (.bin files are pickles: save the model again as safetensors)"
        )
    raise FileNotFoundError(f"{folder} holds none of {', '.join(names)}: no checkpoint's weights")


def _weight_map(index: Path) -> dict[str, str]:
    values = read_json(index)
    weight_map, metadata = values.get("weight_map"), values.get("metadata")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(f, str) for f in weight_map.values()):
        raise ValueError(f"{index} is no index of a checkpoint, it has no weight_map: download it again")
    if not isinstance(metadata, dict):
        raise ValueError(f"{index} has no metadata, which transformers needs: download it again, or add {{}}")
    return weight_map


def _indexed(index: Path) -> list[Path]:
    folder, names = index.parent, sorted(set(_weight_map(index).values()))
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise ValueError(f"the index of {folder} names {', '.join(outside)}: files must lie in the folder itself")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{folder} lacks {', '.join(missing)}, named by its index: download again")
    return [folder / name for name in names]


def weights_hash(folder: Path) -> str:
    """SHA-256 of a checkpoint's safetensors files, their bytes in the order of their names.

    Raises:
        FileNotFoundError, ValueError: as `Weights` does.
    """
    files, _ = _weight_files(folder, pickled=False)
    return _hash_files(tuple((str(file), file.stat().st_mtime_ns) for file in files))


@functools.lru_cache
def _hash_files(stamps: tuple[tuple[str, int], ...]) -> str:
    digest = hashlib.sha256()
    for path, _ in stamps:
        with open(path, "rb") as stream:
            while block := stream.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()


class ShardWriter:
    """Writes tensors into safetensors shards of a folder, holding at most one shard's worth.

    Args:
        folder: of the files to write.
        limit: bytes after which a shard is written.
    """

    def __init__(self, folder: Path, limit: int = SHARD_BYTES) -> None:
        self._folder, self._limit = folder, limit
        self._pending: dict[str, torch.Tensor] = {}
        self._bytes = self._total = 0
        self._shards: list[list[str]] = []

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take one tensor; it may be written now or later."""
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._bytes + size > self._limit:
            self._flush()
        self._pending[name] = tensor.contiguous()
        self._bytes += size
        self._total += size

    def finish(self) -> None:
        """Write the rest, give the shards their final names and write the index; one shard needs none."""
        self._flush()
        count = len(self._shards)
        names = [SINGLE] if count == 1 else [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
        for shard, name in enumerate(names):
            (self._folder / f"shard-{shard}").rename(self._folder / name)
        if count > 1:
            weight_map = {key: name for name, keys in zip(names, self._shards, strict=True) for key in keys}
            index = {"metadata": {"total_size": self._total}, "weight_map": dict(sorted(weight_map.items()))}
            write_json(self._folder / INDEX, index)

    def _flush(self) -> None:
        save_file(self._pending, self._folder / f"shard-{len(self._shards)}", {"format": "pt"})
        self._shards.append(list(self._pending))
        self._pending, self._bytes = {}, 0


def _open_safetensors(file: Path) -> Any:
    try:
        return safe_open(file, "pt")
    except SafetensorError as error:
        raise _damaged(file, error) from error


def _load_bin(file: Path) -> dict[str, torch.Tensor]:
    with file.open("rb") as stream:
        zipped = stream.read(2) == b"PK"
    if zipped and not zipfile.is_zipfile(file):
        raise _damaged(file, "its end is missing")
    if zipped and any(entry.compress_type != zipfile.ZIP_STORED for entry in zipfile.ZipFile(file).infolist()):
        raise _damaged(file, "it is compressed, as torch never writes it")
    try:
        # Files of the oldest format have no fixed places for tensors, so they cannot be mapped.
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{file} holds more than tensors, and reading it could run code, so it is refused "
            f"({_first_line(error)}): get the checkpoint as safetensors"
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        raise _damaged(file, _first_line(error)) from error
    if not isinstance(tensors, dict):
        raise ValueError(f"{file} must hold a dict of tensors, found {type(tensors).__name__}")
    others = [str(name) for name, value in tensors.items() if not _is_stored(value)]
    if others:
        raise ValueError(
            f"{file} must hold tensors only, but {', '.join(others[:8])} are none: save its state dict alone"
        )
    return tensors


def _is_stored(value: Any) -> bool:
    """Whether a value is a tensor whose numbers all lie in the file: no sparse one, no view of one number."""
    dense = isinstance(value, torch.Tensor) and value.layout is torch.strided and value.device.type == "cpu"
    return dense and value.numel() * value.element_size() <= value.untyped_storage().nbytes()


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _damaged(file: Path, reason: Any) -> ValueError:
    return ValueError(f"{file} is damaged or truncated ({reason}): download it again")
