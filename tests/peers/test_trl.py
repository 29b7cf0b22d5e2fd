"""trl's tests of its SFT and DPO trainers, with crafted models in place of theirs.

Its archive on PyPI has no tests: they run when `tests/` of its repository lies in `.peers/sources/trl-VERSION`.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict

from families import dense_config
from peers.hub import ON_THE_HUB, give_default_targets, save_models
from peers.sources import import_peer
from pesc import PescConfig

sft = import_peer("trl", "test_sft_trainer")
dpo = import_peer("trl", "test_dpo_trainer")

_QWEN2 = "trl-internal-testing/tiny-Qwen2ForCausalLM-2.5"
MODELS = {
    _QWEN2: "qwen2",
    "trl-internal-testing/tiny-Qwen3ForCausalLM": "qwen3",
    "trl-internal-testing/tiny-LlamaForCausalLM-3.2": "llama",
    "trl-internal-testing/tiny-MistralForCausalLM-0.2": "mistral",
    "trl-internal-testing/tiny-GptOssForCausalLM": "llama",
}
RUN = {_QWEN2}
DIFFERENT = {
    r".*SFT::test_train_with_gradient_checkpointing_reentrant\[True": (
        "reentrant checkpointing cuts the router's losses off from the router, and is refused"
    ),
}
ELSEWHERE = {
    ".*::test_(trust_remote_code|train_gpt_oss|train_completion_only_harmony|train_toolcall|vision_data)": ON_THE_HUB,
    ".*::test_train_with_set_chat_template": ON_THE_HUB,
    ".*assistant_only": "it needs a chat template that trl knows",
    ".*packing$": "it counts the packs of texts that only the hub has",
    ".*::test_tag_added": "trl's default precision needs a GPU",
}


def message(role: str, text: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


def rows(config: str) -> list[dict[str, Any]]:
    """Examples with the columns that trl's data set has under a name."""
    chat = config.startswith("conversational")
    columns = {}
    for number in range(17):
        prompt, good, bad = f"count to {number}", f" one two {number}", " no idea"
        if chat:
            prompt, good, bad = message("user", prompt), message("assistant", good), message("assistant", bad)
        columns[number] = {
            "language_modeling": {"messages" if chat else "text": prompt + good},
            "prompt_completion": {"prompt": prompt, "completion": good},
            "preference": {"prompt": prompt, "chosen": good, "rejected": bad},
            "implicit_prompt_preference": {"chosen": prompt + good, "rejected": prompt + bad},
            "unpaired_preference": {"prompt": prompt, "completion": good, "label": bool(number % 2)},
        }[config.split("_", 1)[1]]
    return list(columns.values())


def load_dataset(path: str, config: str, split: str | None = None, streaming: bool = False) -> Any:
    """trl's data set, from here."""
    assert path == "trl-internal-testing/zen", f"{path} is on the hub only"
    data = DatasetDict(train=Dataset.from_list(rows(config)), test=Dataset.from_list(rows(config)[:2]))
    if split is None:
        return data
    part = data[split.split("[")[0]]
    first = re.search(r"\[:(\d+)\]", split)
    part = part.select(range(int(first[1]))) if first else part
    return part.to_iterable_dataset() if streaming else part


@pytest.fixture(autouse=True)
def hub(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    give_default_targets(monkeypatch)
    monkeypatch.chdir(request.getfixturevalue("crafted" if request.cls.crafted else "dense"))
    for module, settings in ((sft, "SFTConfig"), (dpo, "DPOConfig")):
        monkeypatch.setattr(module, "load_dataset", load_dataset)
        monkeypatch.setattr(module, settings, partial(getattr(module, settings), bf16=False))  # they have GPUs


def save(folder: Path, pesc: PescConfig | None) -> Path:
    configs = {name: dense_config(family, vocab_size=264, num_hidden_layers=2) for name, family in MODELS.items()}
    return save_models(folder, configs, pesc)


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("dense"), None)


@pytest.fixture(scope="session")
def crafted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("crafted"), PescConfig(num_experts=4, adapter_dim=8))


class TestDenseSFT(sft.TestSFTTrainer):
    crafted = False


class TestCraftedSFT(sft.TestSFTTrainer):
    crafted = True


class TestDenseDPO(dpo.TestDPOTrainer):
    crafted = False


class TestCraftedDPO(dpo.TestDPOTrainer):
    crafted = True
