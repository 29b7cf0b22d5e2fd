"""Export of whatever `pesc.load` takes: runs, adapters and crafted folders; standalone, small, or in a layout."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import pesc
from checkpoints import tiny_dense, without_sums
from families import disturb, tokens
from pesc import PescConfig
from pesc.crafting.surgery import crafted_ffns
from pesc.data.settings import DataSettings
from pesc.interop.formats import FORMATS, export, import_checkpoint
from pesc.interop.places import public_name
from pesc.report.results import read_results, to_json
from pesc.training.recipe import ModelSettings, OutputSettings
from published import crafted
from studies import make_results

GATED = {"adapter_placement": "parallel", "adapter_activation": "swiglu"}
RESULTS = make_results({"chat": -0.5, "code": -0.25})


def make_run(folder: Path, **method: str) -> Path:
    """A run: tuned LoRA and experts on a base of its own, with recipe and results."""
    base = tiny_dense(folder / "base")
    (base / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: en\n---\n\nA base.\n")
    (base / "LICENSE").write_text("the licence's text")
    model = pesc.load(base)
    if method:
        model = pesc.craft(model, PescConfig(num_experts=4, adapter_dim=8, **method))
    pesc.add_lora(model, LoraConfig(r=2, target_modules="all-linear"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    disturb(model)
    run = folder / "run"
    pesc.save_adapter(model, run / "adapter")
    recipe = pesc.Recipe(
        model=ModelSettings(name=str(base)),
        data=DataSettings(train="/home/me/rows.jsonl"),
        output=OutputSettings(folder=run),
    )
    recipe.save(run / "recipe.yaml")
    (run / "results.json").write_text(to_json(RESULTS))
    return run


def ids() -> torch.Tensor:
    return torch.randint(3, 259, (2, 11), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("part", ["", "adapter"])
def test_a_run_becomes_a_standalone_folder(part: str, tmp_path: Path) -> None:
    run = make_run(tmp_path, **GATED)
    expected = pesc.load(run)(ids()).logits
    out = export(run / part, tmp_path / "out", "pesc")
    model = AutoModelForCausalLM.from_pretrained(out)
    assert not hasattr(model, "peft_config")
    assert len(crafted_ffns(model)) == 2
    torch.testing.assert_close(model(ids()).logits, expected, atol=1e-5, rtol=1e-5)
    assert pesc.load_tokenizer(out).chat_template == pesc.load_tokenizer(tmp_path / "base").chat_template
    assert (out / "LICENSE").read_text() == "the licence's text"
    recipe = yaml.safe_load((out / "recipe.yaml").read_text())
    assert (recipe["model"]["name"], recipe["data"]["train"], "output" in recipe) == ("base", "rows.jsonl", False)
    assert read_results(out) == RESULTS


def test_the_card_says_what_the_model_is(tmp_path: Path) -> None:
    run = make_run(tmp_path, **GATED)
    text = (export(run, tmp_path / "my-model", "pesc") / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "license": "apache-2.0",
        "language": "en",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["pesc", "mixture-of-experts"],
    }
    assert body.strip().startswith("# my-model\n")
    for line in (
        "| experts in a layer, of these for each token | 4, 2 |",
        "| PESC | 1.3628 | 0.9208 |",
        "- chat: examples about chat (Apache-2.0)",
        "train: rows.jsonl",
        "## Intended use and limits",
        "The base's: apache-2.0.",
    ):
        assert line in body
    # Paths of the machine that trained it stay there.
    assert "/home/me" not in text
    assert str(tmp_path) not in text


def test_no_export_names_a_folder_of_this_machine(tmp_path: Path) -> None:
    run = make_run(tmp_path / "here", **GATED)
    for format in ("pesc", "adapter", "stock", "gguf-f16"):
        out = export(run, tmp_path / f"{format}{FORMATS[format].suffix if format in FORMATS else ''}", format)
        for file in [out] if out.is_file() else out.iterdir():
            assert str(tmp_path).encode() not in file.read_bytes(), file
    settings = json.loads((tmp_path / "adapter" / "adapter.json").read_text())
    assert settings["base_model"] == "base"


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("/home/me/models/base", "base"),
        ("/home/me/.cache/huggingface/hub/models--org--a--b/snapshots/0123abc", "org/a--b"),
        ("~/base", "base"),
        ("org/name", "org/name"),
        ("smollm2-135m-instruct", "smollm2-135m-instruct"),
    ],
)
def test_public_names(place: str, name: str) -> None:
    assert public_name(place) == name


def test_the_licence_of_a_base_is_known_through_its_crafted_folder(tmp_path: Path) -> None:
    base = tiny_dense(tmp_path / "base")
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    out = pesc.craft_checkpoint(base, tmp_path / "crafted", PescConfig(num_experts=2, adapter_dim=4))
    assert "license: apache-2.0" in (export(out, tmp_path / "out", "pesc") / "README.md").read_text()


def test_a_relative_folder_that_vanished_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "a", **GATED)
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["model"]["name"], recipe["data"]["train"] = "a/base", [{"path": "/home/me/rows.jsonl"}, {"path": "org/rows"}]
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "a" / "base").rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path / "elsewhere")
    out = export(run, tmp_path / "out", "pesc", base=tmp_path / "moved")
    assert "base_model:" not in (out / "README.md").read_text()
    recipe = yaml.safe_load((out / "recipe.yaml").read_text())
    assert recipe["model"]["name"] == "base"
    assert recipe["data"]["train"] == [{"path": "rows.jsonl"}, {"path": "org/rows"}]


@pytest.mark.parametrize(
    ("text", "fault"), [("a: [", "is no YAML"), ("- a", "must hold a mapping"), ("\0", "is no YAML")]
)
def test_a_recipe_that_cannot_be_read_is_named(text: str, fault: str, tmp_path: Path) -> None:
    run = make_run(tmp_path, **GATED)
    (run / "recipe.yaml").write_text(text)
    with pytest.raises(ValueError, match=f"recipe.yaml {fault}") as error:
        export(run, tmp_path / "out", "pesc")
    assert "\n" not in str(error.value)
    (run / "recipe.yaml").write_text("data: [1]\nmodel: 3\n")
    assert "Data: `unknown`" in (export(run, tmp_path / "out", "pesc") / "README.md").read_text()


def test_a_crafted_folder_keeps_its_bytes(tmp_path: Path) -> None:
    crafted(tmp_path / "ours")
    out = export(tmp_path / "ours", tmp_path / "out", "pesc")
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "ours" / "model.safetensors").read_bytes()
    assert torch.equal(pesc.load(out)(tokens()).logits, pesc.load(tmp_path / "ours")(tokens()).logits)
    text = (out / "README.md").read_text()
    assert "license: unknown" in text
    assert "look it up" in text
    assert "No recipe was found" in text


def test_a_checkpoint_in_shards_is_copied_whole(tmp_path: Path) -> None:
    base = tiny_dense(tmp_path / "base", max_shard_size="40KB")
    ours = pesc.craft_checkpoint(base, tmp_path / "ours", PescConfig(num_experts=4, adapter_dim=8, **GATED))
    out = export(ours, tmp_path / "out", "pesc")
    assert len(list(out.glob("*.safetensors"))) > 2
    assert torch.equal(pesc.load(out)(ids()).logits, pesc.load(ours)(ids()).logits)
    stock = AutoModelForCausalLM.from_pretrained(export(ours, tmp_path / "stock", "stock"))
    torch.testing.assert_close(stock(ids()).logits, pesc.load(base)(ids()).logits, atol=1e-5, rtol=1e-5)


def test_an_index_of_bin_files_is_copied_too(tmp_path: Path) -> None:
    crafted(tmp_path / "ours", **GATED)
    ours, tensors = tmp_path / "ours", load_file(tmp_path / "ours" / "model.safetensors")
    halves = [dict(list(tensors.items())[start::2]) for start in (0, 1)]
    for number, half in enumerate(halves):
        torch.save(half, ours / f"pytorch_model-{number}.bin")
    weight_map = {name: f"pytorch_model-{number}.bin" for number, half in enumerate(halves) for name in half}
    (ours / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (ours / "model.safetensors").unlink()
    out = export(ours, tmp_path / "out", "pesc")
    assert torch.equal(pesc.load(out)(tokens()).logits, pesc.load(ours)(tokens()).logits)


def test_a_dense_model_tuned_with_lora_becomes_an_ordinary_one(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    out = export(run, tmp_path / "out", "pesc")
    assert json.loads((out / "config.json").read_text())["model_type"] == "llama"
    expected = pesc.load(run)(ids()).logits
    torch.testing.assert_close(pesc.load(out)(ids()).logits, expected, atol=1e-5, rtol=1e-5)
    assert "which is folded into the weights" in (out / "README.md").read_text()
    with pytest.raises(ValueError, match="it has no experts.*The nearest that can: --format pesc, which folds LoRA in"):
        export(run, tmp_path / "stock", "granitemoeshared")


def test_a_run_goes_into_a_stock_architecture_lora_folded(tmp_path: Path) -> None:
    run = make_run(tmp_path, **GATED)
    stock = AutoModelForCausalLM.from_pretrained(export(run, tmp_path / "out", "granitemoeshared"))
    torch.testing.assert_close(stock(ids()).logits, pesc.load(run)(ids()).logits, atol=1e-5, rtol=1e-5)


def test_a_run_goes_into_a_published_layout_lora_folded(tmp_path: Path) -> None:
    run = make_run(tmp_path, adapter_placement="sequential", adapter_activation="gelu")
    theirs = export(run, tmp_path / "theirs", "camelidae")
    again = import_checkpoint(theirs, tmp_path / "again")
    torch.testing.assert_close(pesc.load(again)(ids()).logits, pesc.load(run)(ids()).logits, atol=1e-5, rtol=1e-5)
    assert (theirs / "tokenizer.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "base", "run", "theirs"]


def test_an_adapter_is_copied_alone(tmp_path: Path) -> None:
    run = make_run(tmp_path, **GATED)
    out = export(run, tmp_path / "out", "adapter")
    assert sorted(path.name for path in out.iterdir()) == ["SHA256SUMS", "adapter.json", "adapter.safetensors"]
    assert torch.equal(pesc.load(out, base=tmp_path / "base")(ids()).logits, pesc.load(run)(ids()).logits)
    crafted(tmp_path / "ours")
    with pytest.raises(ValueError, match="only a tuned run has an adapter. The nearest that can: --format pesc"):
        export(tmp_path / "ours", tmp_path / "no", "adapter")


DAMAGED = {
    "unexpected": {"model.layers.1.mlp.extra.weight": torch.ones(2, 2)},
    "missing": {"model.layers.1.mlp.router.weight": None},
    "holds 1 NaN": {"model.layers.1.mlp.router.weight": torch.tensor([[torch.nan, *range(31)], *torch.eye(3, 32)])},
    "cannot choose": {"model.layers.1.mlp.router.weight": torch.zeros(4, 32)},
    "damaged or truncated": {},
}


@pytest.mark.parametrize("fault", DAMAGED)
@pytest.mark.parametrize("format", ["adapter", "pesc"])
def test_a_damaged_adapter_is_refused_in_one_line(format: str, fault: str, tmp_path: Path) -> None:
    run = without_sums(make_run(tmp_path, **GATED))
    file = run / "adapter" / "adapter.safetensors"
    tensors = {name: tensor for name, tensor in (load_file(file) | DAMAGED[fault]).items() if tensor is not None}
    save_file(tensors, file)
    if not DAMAGED[fault]:
        file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ValueError, match=fault) as error:
        export(run, tmp_path / "out", format)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_refusals_come_before_any_weight_is_read(tmp_path: Path) -> None:
    run = make_run(tmp_path, **GATED)
    (without_sums(run) / "adapter" / "adapter.safetensors").unlink()
    with pytest.raises(ValueError, match=r"parallel \+ swiglu.*granitemoeshared"):
        export(run, tmp_path / "out", "camelidae")
    with pytest.raises(ValueError, match="its base is llama.*--format granitemoeshared"):
        export(run, tmp_path / "out", "qwen3_next")
    assert not (tmp_path / "out").exists()


def test_without_the_package_gguf_every_other_format_still_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    crafted(tmp_path / "ours")
    with pytest.raises(ValueError, match=r"its experts are sequential \+ gelu.*--format pesc"):
        export(tmp_path / "ours", tmp_path / "out", "granitemoeshared")
    with pytest.raises(ValueError, match=r"its experts are sequential \+ gelu.*--format pesc"):
        export(tmp_path / "ours", tmp_path / "out.gguf", "gguf-f16")
    run = make_run(tmp_path, **GATED)
    with pytest.raises(FileNotFoundError, match="pip install gguf"):
        export(run, tmp_path / "out.gguf", "gguf-f16")
    assert not (tmp_path / "out.gguf").exists()


def test_unknown_formats_and_taken_names_are_refused(tmp_path: Path) -> None:
    crafted(tmp_path / "ours", **GATED)
    with pytest.raises(ValueError, match=r"format \('mixtral'\) must be one of stock, granitemoeshared"):
        export(tmp_path / "ours", tmp_path / "out", "mixtral")
    (tmp_path / "out").mkdir()
    for format in ("pesc", "granitemoeshared"):
        with pytest.raises(FileExistsError, match="exists already"):
            export(tmp_path / "ours", tmp_path / "out", format)
    with pytest.raises(ValueError, match="it has no experts: it is a dense llama model. Its folder is what other"):
        export(tiny_dense(tmp_path / "dense"), tmp_path / "new", "pesc")
    assert len(FORMATS) == 10


def test_a_folder_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    crafted(tmp_path / "ours", **GATED)
    tensors = load_file(tmp_path / "ours" / "model.safetensors")
    del tensors["model.layers.1.mlp.experts.down_proj"]
    save_file(tensors, tmp_path / "ours" / "model.safetensors", {"format": "pt"})
    for format in ("pesc", "granitemoeshared"):
        with pytest.raises(ValueError, match=r"missing: model\.layers\.1\.mlp\.experts\.down_proj"):
            export(tmp_path / "ours", tmp_path / "out", format)
        assert not (tmp_path / "out").exists()
