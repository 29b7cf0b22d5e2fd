"""A run's checkpoints: there complete or not at all, and read only if they are as they were written."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from pesc.crafting.adapter import ADAPTER, load_adapter_weights, save_adapter
from pesc.storage.files import file_sha256, new_folder, read_json, write_json

DIGESTS = "sha256.json"
_PREFIX = f"{PREFIX_CHECKPOINT_DIR}-"


class AdapterCheckpoints(Trainer):
    """Checkpoints hold the adapter folder: neither the base, nor anything pickled of the model."""

    _stage: Path | None = None
    """Where the parent class writes the checkpoint in progress."""

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """As the parent class, in a folder that gets its name when it is complete; then removes old ones."""
        folder = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        with new_folder(folder) as partial:
            self._stage = partial.parent
            super()._save_checkpoint(model, trial)
            write_json(partial / DIGESTS, _digests(partial))
        if self.args.save_total_limit:
            # The oldest by their steps: the parent class goes by the clock, which may have jumped.
            best = f"{_PREFIX}{self.state.best_global_step}"
            for old in _checkpoints(folder.parent)[: -self.args.save_total_limit]:
                if old.name != best:
                    shutil.rmtree(old)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._stage or self.args.output_dir)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        template = self.processing_class.chat_template
        own = template if isinstance(template, str) else None  # several by name are the base's
        save_adapter(self.model, Path(output_dir or self.args.output_dir) / ADAPTER, chat_template=own)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """None for checkpoints: trl's would describe another kind of folder."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_adapter_weights(model or self.model, Path(resume_from_checkpoint) / ADAPTER)


def last_checkpoint(folder: Path, console: Console) -> Path | None:
    """The newest intact checkpoint in a folder, or None. Newer ones that are damaged are named and removed."""
    for checkpoint in reversed(_checkpoints(folder)):
        if (fault := fault_of(checkpoint)) is None:
            return checkpoint
        console.print(f"removed a damaged checkpoint, {checkpoint}: {fault}", highlight=False, markup=False)
        shutil.rmtree(checkpoint)
    return None


def fault_of(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files; None if they are as they were written."""
    try:
        written, found = read_json(checkpoint / DIGESTS), _digests(checkpoint)
    except (FileNotFoundError, ValueError) as error:
        return str(error)
    damaged = sorted(name for name in written if written[name] != found.get(name))
    return f"not as it was written: {', '.join(damaged)}" if damaged else None


def _checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    steps = {path: path.name.removeprefix(_PREFIX) for path in folder.glob(f"{_PREFIX}*")}
    return sorted((path for path, step in steps.items() if step.isdecimal()), key=lambda path: int(steps[path]))


def _digests(checkpoint: Path) -> dict[str, str]:
    """The SHA-256 of each of a checkpoint's files, but that which holds them."""
    files = [file for file in sorted(checkpoint.rglob("*")) if file.is_file() and file.name != DIGESTS]
    return {str(file.relative_to(checkpoint)): file_sha256(file) for file in files}
