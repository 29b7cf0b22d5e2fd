"""What SECURITY.md promises: nothing in a file that we read runs code."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch

from checkpoints import tiny_dense, write_rows
from pesc import load, load_tokenizer
from pesc.cli import main
from pesc.data.chat import encode_messages
from pesc.storage.files import write_json
from pesc.training.checkpoints import DIGESTS, _digests
from pesc.training.recipe import load_recipe
from pesc.training.trainer import PescTrainer

RECIPE = """\
model: {name: dense}
pesc: {num_experts: 2, adapter_dim: 4}
lora: {r: 2, alpha: 4}
data: {train: rows.jsonl, max_length: 64}
training: {steps: 4, batch_size: 2}
output: {folder: run, save_steps: 2}
"""


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    tiny_dense(tmp_path / "dense")
    write_rows(tmp_path / "rows.jsonl")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path


class _Attack:
    def __reduce__(self) -> tuple:
        return Path.touch, (Path("ran"),)


READ = ("optimizer.pt", "scheduler.pt", "rng_state.pth")
NEVER_READ = ("training_args.bin", "pytorch_model.bin", "adapter_model.bin", "custom_checkpoint_0.pkl")


def test_a_pickle_in_a_checkpoint_is_refused_or_passed_over(
    workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = _interrupted_run(monkeypatch)
    assert {path.name for path in checkpoint.iterdir() if path.suffix in (".pt", ".pth", ".bin", ".pkl")} == set(READ)
    for name in NEVER_READ:
        (checkpoint / name).write_bytes(pickle.dumps(_Attack()))
    for name in READ:
        kept = (checkpoint / name).read_bytes()
        torch.save({"state": _Attack()}, checkpoint / name)
        # Whoever can write a checkpoint can write its hashes too.
        write_json(checkpoint / DIGESTS, _digests(checkpoint))
        capsys.readouterr()
        assert main(["train", "recipe.yaml"]) == 1, name
        assert f"{checkpoint} was not read, as its" in capsys.readouterr().err.splitlines()[-1]
        assert not Path("ran").exists(), name
        (checkpoint / name).write_bytes(kept)
    assert main(["train", "recipe.yaml"]) == 0
    assert f"removed a damaged checkpoint, {checkpoint}" in " ".join(capsys.readouterr().out.split())
    assert not Path("ran").exists()


def _interrupted_run(monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run's first checkpoint; it was interrupted in its third step."""
    plain, calls = PescTrainer.training_step, iter(range(100))

    def step(self, *args, **kwargs):
        if next(calls) == 2:
            raise KeyboardInterrupt
        return plain(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(PescTrainer, "training_step", step)
        assert main(["train", "recipe.yaml"]) == 130
    return Path("run/checkpoints/checkpoint-2")


def test_code_that_a_folder_names_or_holds_is_never_run(workplace: Path) -> None:
    code = f"open({str(workplace / 'ran')!r}, 'w').close()\n"
    for name in ("theirs.py", "custom_generate/generate.py", "chat_template.py", "setup.py"):
        (workplace / "dense" / name).parent.mkdir(exist_ok=True)
        (workplace / "dense" / name).write_text(code + "def generate(model, **kwargs): return None\n")
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        path = workplace / "dense" / name
        values = json.loads(path.read_text()) | {
            "auto_map": {
                "AutoConfig": "theirs.Config",
                "AutoModelForCausalLM": "theirs.Model",
                "AutoTokenizer": ["theirs.Tokenizer", "theirs.Tokenizer"],
            },
            "custom_generate": "dense",
            "trust_remote_code": True,
        }
        path.write_text(json.dumps(values))
    tokenizer, model = load_tokenizer("dense"), load("dense")
    model.generate(torch.tensor([[5, 6]]), max_new_tokens=2, do_sample=False)
    assert tokenizer.chat_template
    assert main(["info", "dense"]) == 0
    assert main(["craft", "dense", "crafted", "--adapter-dim", "4"]) == 0
    assert "auto_map" not in Path("crafted/config.json").read_text()
    assert "auto_map" not in Path("crafted/tokenizer_config.json").read_text()
    assert not Path("ran").exists()


def test_a_config_that_names_compiled_code_of_a_hub_is_refused(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads(Path("dense/config.json").read_text())
    Path("dense/config.json").write_text(json.dumps(config | {"attn_implementation": "theirs/kernel"}))
    for words in (["info", "dense"], ["craft", "dense", "out"], ["train", "recipe.yaml"], ["chat", "dense"]):
        capsys.readouterr()
        assert main(words) == 1, words
        assert "attn_implementation (theirs/kernel) names compiled code" in capsys.readouterr().err


def test_a_chat_template_reaches_nothing_outside_its_sandbox(workplace: Path) -> None:
    tokenizer = load_tokenizer("dense")
    tokenizer.chat_template = "{{ messages.__class__.__base__.__subclasses__() }}"
    with pytest.raises(ValueError, match="chat template"):
        encode_messages([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], tokenizer)


def test_a_recipe_makes_no_objects(workplace: Path) -> None:
    Path("recipe.yaml").write_text(RECIPE + "x: !!python/object/apply:pathlib.Path.touch [ran]\n")
    with pytest.raises(ValueError, match="must be YAML"):
        load_recipe(Path("recipe.yaml"))
    assert not Path("ran").exists()


def test_an_adapter_imports_no_module(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """peft can be told in LoRA's settings to import one."""
    monkeypatch.syspath_prepend(workplace)
    Path("theirs.py").write_text(f"open({str(workplace / 'ran')!r}, 'w').close()\n")
    assert main(["train", "recipe.yaml"]) == 0
    path = Path("run/adapter/adapter.json")
    settings = json.loads(path.read_text())
    settings["lora"] |= {"megatron_config": {"a": 1}, "megatron_core": "theirs"}
    path.write_text(json.dumps(settings))
    with pytest.raises(ValueError):
        load("run")
    assert not Path("ran").exists()
