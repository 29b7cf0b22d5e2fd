"""A finished run's adapter goes to a hub with its card, and a hub that fails costs nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from hub import running_hub
from pesc.cli import main
from pesc.storage.hub import upload
from pesc.training.recipe import load_recipe
from runs import make_recipe


@pytest.mark.parametrize("pesc", [True, False], ids=["experts", "LoRA alone"])
def test_the_adapter_is_pushed_with_its_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], pesc: bool
) -> None:
    changes = {} if pesc else {"pesc": None}
    make_recipe(tmp_path, steps=1, push_to_hub="org/tuned", **changes).save(tmp_path / "recipe.yaml")
    adapter = tmp_path / "run" / "adapter"
    with running_hub(monkeypatch) as hub:
        for _ in range(2):  # the second time all is there
            assert main(["train", str(tmp_path / "recipe.yaml")]) == 0
            assert f"pushed the adapter to {hub.address}/org/tuned" in capsys.readouterr().out
            assert hub.commits == 1
    assert hub.private == {"org/tuned": True}
    files = hub.files["org/tuned"]
    assert set(files) == {"README.md", "SHA256SUMS", "adapter.json", "adapter.safetensors", "recipe.yaml"}
    assert files["adapter.safetensors"] == (adapter / "adapter.safetensors").read_bytes()
    card = files["README.md"].decode()
    matter = yaml.safe_load(card.split("---")[1])
    assert matter["tags"] == (["pesc", "mixture-of-experts"] if pesc else ["lora"])
    assert "# tuned\n" in card and "pesc.load(" in card and "folded" not in card
    shared = b"".join(content for name, content in files.items() if name != "adapter.safetensors").decode()
    assert str(tmp_path) not in shared
    assert json.loads(files["adapter.json"])["base_model"] == "dense"


def test_a_hub_that_fails_loses_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_recipe(tmp_path, steps=1, push_to_hub="org/tuned").save(tmp_path / "recipe.yaml")

    def fails() -> str:
        capsys.readouterr()
        assert main(["train", str(tmp_path / "recipe.yaml")]) == 1
        assert (tmp_path / "run" / "adapter" / "adapter.safetensors").is_file()
        assert not (tmp_path / "run" / "checkpoints").exists()
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith(
            f"pesc: {tmp_path}/run holds the complete run, but org/tuned: the hub did not take it ("
        )
        assert error.endswith("): the same command tries again")
        return error

    assert "offline mode is enabled" in fails()
    with running_hub(monkeypatch) as hub:
        hub.refuses = 403
        assert "403 Forbidden" in fails()
    with running_hub(monkeypatch) as hub:
        assert main(["train", str(tmp_path / "recipe.yaml")]) == 0
        assert hub.commits == 1


def test_a_hub_that_cannot_be_reached_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running_hub(monkeypatch) as hub:
        pass
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.address)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(OSError, match=r"org/name: the hub did not take it \(.*refused.*\)$"):
        upload(tmp_path, "org/name")


@pytest.mark.parametrize("name", ["tuned", "/org/tuned", "https://huggingface.co/org/tuned"])
def test_what_is_no_hub_id_is_refused_before_the_run(tmp_path: Path, name: str) -> None:
    make_recipe(tmp_path).save(tmp_path / "recipe.yaml")
    with pytest.raises(ValueError, match="output.push_to_hub .* must be text such as org/name, or null"):
        load_recipe(tmp_path / "recipe.yaml", [f"output.push_to_hub={name}"])
