"""The command line: help is fast and has examples, mistakes get a sentence and an exit code."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import pesc
from checkpoints import tiny_dense, write_rows
from families import disturb
from pesc.cli import app, main

VERBS = ["demo", "craft", "data", "train", "info", "chat", "import", "verify", "bench", "serve", "export"]


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_an_example(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--help"]) == 0
    assert f"pesc {verb}" in capsys.readouterr().out.split("Example")[1]


def test_help_loads_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from pesc.cli import main; main(['--help']); "
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_the_package_runs_as_the_command() -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, "-m", "pesc", *arguments], capture_output=True, text=True)

    assert run("--version").stdout.strip() == pesc.__version__
    failed = run("info", "/no/such/model")
    assert failed.returncode == 1
    assert failed.stderr.startswith("pesc: ") and "Traceback" not in failed.stderr


def test_craft_info_train(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dense, out = str(tiny_dense(tmp_path / "dense")), str(tmp_path / "out")
    assert main(["craft", dense, out, "--num-experts", "4", "--adapter-dim", "8"]) == 0
    assert "4 in every layer, top 2" in capsys.readouterr().out
    assert main(["info", out, "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert (info["pesc"]["num_experts"], len(info["untouched"])) == (4, 8)
    recipe = tmp_path / "recipe.yaml"
    rows = write_rows(tmp_path / "rows.jsonl")
    recipe.write_text(
        f"model: {{name: {dense}}}\ndata: {{train: {rows}, max_length: 128}}\noutput: {{folder: {tmp_path / 'run'}}}\n"
    )
    changes = ["pesc.num_experts=4", "pesc.adapter_dim=8", "lora.r=4", "training.steps=2"]
    assert main(["train", str(recipe), *changes]) == 0
    assert "pesc chat" in capsys.readouterr().out
    assert main(["info", str(tmp_path / "run")]) == 0
    assert "adapter of" in capsys.readouterr().out


def test_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dense, out = str(tiny_dense(tmp_path / "dense")), str(tmp_path / "crafted")
    assert main(["craft", dense, out, "--num-experts", "4", "--adapter-dim", "8"]) == 0
    assert main(["export", out, str(tmp_path / "layout"), "--format", "sparsetral"]) == 0
    assert "wrote" in capsys.readouterr().out
    assert main(["verify", str(tmp_path / "layout")]) == 0
    assert main(["export", out, str(tmp_path / "stock"), "--format", "stock"]) == 1
    assert "parallel" in capsys.readouterr().err
    assert main(["craft", dense, str(tmp_path / "lists"), "--num-experts", "4", "--num-experts", "2"]) == 0
    assert "[4, 2] in every layer" in capsys.readouterr().out


def test_import_and_verify(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fixture = str(Path(__file__).parent / "fixtures" / "camelidae-8x")
    assert main(["verify", fixture]) == 0
    assert "complete" in capsys.readouterr().out
    assert main(["import", fixture, str(tmp_path / "out")]) == 0
    assert main(["verify", str(tmp_path / "out"), "--json"]) == 0
    assert '"complete": true' in capsys.readouterr().out
    shard = tmp_path / "stripped"
    shutil.copytree(fixture, shard)
    tensors = {k: v for k, v in load_file(shard / "model.safetensors").items() if ".moe_adapter." not in k}
    save_file(tensors, shard / "model.safetensors", {"format": "pt"})
    assert main(["verify", str(shard)]) == 1
    assert "not complete" in capsys.readouterr().out


def test_an_adapter_whose_base_moved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = pesc.craft(pesc.load(tiny_dense(tmp_path / "base")), pesc.PescConfig(num_experts=4, adapter_dim=8))
    adapter = str(pesc.save_adapter(disturb(model), tmp_path / "adapter"))
    moved = str((tmp_path / "base").rename(tmp_path / "moved"))
    out = str(tmp_path / "out")
    for arguments in (["info", adapter], ["verify", adapter], ["export", adapter, out]):
        assert main(arguments) == 1
        output = capsys.readouterr()
        assert "--base" in output.out + output.err
        assert main([*arguments, "--base", moved]) == 0
    for verb in ("chat", "serve"):
        assert main([verb, adapter]) == 1
        assert "--base" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["inof"], 2, "inof"),
        (["craft", "a"], 2, "requires an argument"),
        (["craft", "a", "b", "--num-expert", "3"], 2, "Did you mean --num-experts"),
        (["craft", "a", "b", "--num-experts", "0"], 1, "num_experts (0) must be an integer of at least 1"),
        (["info", "/no/such/model"], 1, "no such folder"),
        (["chat", "/no/such/model"], 1, "no such folder"),
        (["train", "/no/such/recipe.yaml"], 1, "no such recipe"),
    ],
)
def test_mistakes_get_a_sentence_and_no_traceback(
    arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == code
    output = capsys.readouterr()
    text = " ".join((output.out + output.err).replace("│", " ").split())
    assert message in text
    assert "Traceback" not in text


def test_ctrl_c_exits_with_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pesc.crafting.info.describe", interrupted)
    assert main(["info", "x"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_all_verbs_are_tested() -> None:
    assert {name for name in app if not name.startswith("-")} == set(VERBS)


def test_names_that_look_like_markup_are_shown_as_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "500")
    folder = tmp_path / "[bold]a[" / "x]"
    dense, rows = str(tiny_dense(folder / "dense")), write_rows(folder / "rows.jsonl")

    def shown(*arguments: str) -> str:
        assert main([*arguments]) == 0
        return capsys.readouterr().out

    assert "[bold]a[/x]/crafted" in shown("craft", dense, str(folder / "crafted"), "--num-experts", "4")
    assert "[bold]a[/x]/dense" in shown("info", dense)
    assert "[bold]a[/x]/crafted" in shown("verify", str(folder / "crafted"))
    assert "[bold]a[/x]/out" in shown("export", str(folder / "crafted"), str(folder / "out"), "--format", "sparsetral")
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        json.dumps(
            {
                "model": {"name": dense},
                "lora": {"r": 4},
                "data": {"train": str(rows), "max_length": 128},
                "training": {"steps": 1},
                "output": {"folder": str(folder / "run")},
            }
        )
    )
    assert f"pesc info {folder / 'run'}" in shown("train", str(recipe))
    assert f"{folder / 'run'} holds this run, complete" in shown("train", str(recipe))
