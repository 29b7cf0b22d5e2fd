"""The model card of an exported folder: what the model is, how it was trained, measured, and may be used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from pesc.storage.files import read_json

RECIPE, RESULTS, CARD = "recipe.yaml", "results.json", "README.md"


def licence_of(folder: Path) -> str | None:
    """The licence that the card of a model's folder names; None where it names none."""
    value = _front_matter(folder).get("license")
    return value if isinstance(value, str) else None


def write_card(target: Path, *, name: str, base: str, base_folder: Path, config: Any, run: Path | None) -> None:
    """Write README.md into an exported folder.

    Args:
        target: the folder.
        name: of the model.
        base: the dense model's name: a hub id or a path; empty where nobody knows.
        base_folder: where the base's own card lies.
        config: of the exported model, crafted or dense.
        run: the run's folder, whose recipe.yaml and results.json are quoted where they are there.
    """
    recipe = _yaml(run / RECIPE) if run and (run / RECIPE).is_file() else None
    results = read_json(run / RESULTS) if run and (run / RESULTS).is_file() else None
    matter = _matter(base, base_folder, crafted=config.model_type == "pesc")
    family = getattr(config, "base_model_type", None) or config.model_type
    shown = matter.get("base_model") or Path(base).name or f"a dense {family} model"
    sections = [
        f"---\n{yaml.safe_dump(matter, sort_keys=False)}---",
        f"# {name}",
        _what(config, shown),
        _use(),
        _training(recipe, results),
        _results(results),
        _intended_use(shown),
        _licence(licence_of(base_folder)),
    ]
    (target / CARD).write_text("\n\n".join(section for section in sections if section) + "\n", encoding="utf-8")


def _matter(base: str, base_folder: Path, *, crafted: bool) -> dict[str, Any]:
    own = _front_matter(base_folder)
    known = base if _is_hub_id(base) else own.get("base_model")
    values: dict[str, Any] = {"license": licence_of(base_folder) or "unknown"}
    values |= {key: own[key] for key in ("license_name", "license_link", "language") if key in own}
    if isinstance(known, str) and _is_hub_id(known):
        values["base_model"] = known
    values |= {"library_name": "transformers", "pipeline_tag": "text-generation"}
    return values | {"tags": ["pesc", "mixture-of-experts"] if crafted else ["lora"]}


def _is_hub_id(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and not Path(name).exists()


def _front_matter(folder: Path) -> dict[str, Any]:
    if not (folder / CARD).is_file():
        return {}
    text = (folder / CARD).read_text(encoding="utf-8", errors="replace")
    if not text.startswith("---\n") or "\n---" not in text[4:]:
        return {}
    try:
        values = yaml.safe_load(text[4:].split("\n---")[0])
    except yaml.YAMLError:
        # A base's card is prose by strangers: one that is no YAML says nothing, and stops no export.
        return {}
    return values if isinstance(values, dict) else {}


def _yaml(path: Path) -> dict[str, Any]:
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a mapping, found {type(values).__name__}")
    return values


def _what(config: Any, base: str) -> str:
    if config.model_type != "pesc":
        return f"Made from {base}: tuned with LoRA, which is folded into the weights."
    method = config.method
    layers = "every layer" if method.layers is None else f"layers {method.layers}"
    rows = {
        "experts in a layer, of these for each token": f"{method.num_experts}, {method.num_experts_per_tok}",
        "adapter dim": method.adapter_dim,
        "adapters read": "the FFN's output" if method.adapter_placement == "sequential" else "the FFN's input",
        "adapter": f"{method.adapter_activation}, scaled by {method.adapter_scaling:g}",
        "layers with experts": layers,
    }
    return (
        f"A mixture of experts made from {base} by parameter-efficient sparsity crafting (PESC, arXiv 2401.02731): all "
        "experts of a layer share the dense FFN and differ in a small adapter. LoRA, where there was some, is folded "
        "into the weights.\n\n" + _table(["setting", "value"], [[key, value] for key, value in rows.items()])
    )


def _use() -> str:
    return (
        "## Use\n\n```python\nimport pesc  # teaches transformers the model type\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained("path/of/this/folder")\n'
        'tokenizer = AutoTokenizer.from_pretrained("path/of/this/folder")\n```\n\n'
        "Or, in a terminal: `pesc chat path/of/this/folder`."
    )


def _training(recipe: dict[str, Any] | None, results: dict[str, Any] | None) -> str:
    if recipe is None:
        return "## Training\n\nNo recipe was found beside the model."
    model, data = dict(recipe.get("model") or {}), dict(recipe.get("data") or {})
    # Folders of the machine it was trained on are nobody else's business.
    if not _is_hub_id(str(model.get("name", ""))):
        model["name"] = Path(str(model.get("name", ""))).name
    data["train"] = Path(str(data.get("train", "unknown"))).name
    shown = {key: value for key, value in recipe.items() if key != "output"} | {"model": model, "data": data}
    trained_on = f"Data: `{data['train']}`; every answer of the assistant was trained on."
    origin = (results or {}).get("data", {})
    lines = [f"- {s.get('domain')}: {s.get('source')} ({s.get('licence')})" for s in origin.get("sources", [])]
    lines += [f"- {note}" for note in origin.get("notes", [])]
    listed = "\n\n" + "\n".join(lines) if lines else ""
    return f"## Training\n\n{trained_on}{listed}\n\nRecipe:\n\n```yaml\n{yaml.safe_dump(shown, sort_keys=False)}```"


def _results(results: dict[str, Any] | None) -> str:
    if results is None:
        return "## Results\n\nNo results were found beside the model."
    models = results.get("models") or []
    domains = sorted({domain for model in models for domain in model.get("loss", {})})
    rows = [[model.get("name"), *(f"{model['loss'].get(d, float('nan')):.4f}" for d in domains)] for model in models]
    table = _table(["held-out loss", *domains], rows)
    return f"## Results\n\n{table}\n\nLoss is nats a token on rows kept out of training; lower is better."


def _intended_use(base: str) -> str:
    return (
        "## Intended use and limits\n\n"
        f"Research on, and use of, small-cost mixtures of experts, within what its base ({base}) is meant and allowed "
        "for. The model has its base's knowledge, languages, biases and errors, and those of the data it was tuned on. "
        "It was not tested for safety: do not let it act or advise unwatched where an error would harm someone."
    )


def _licence(licence: str | None) -> str:
    if licence:
        return f"## Licence\n\nThe base's: {licence}. Its files, where there were some, lie in this folder."
    return (
        "## Licence\n\nThe base's, whose card was not found beside its weights: look it up, and write it into the "
        "first lines of this file, before you share the model."
    )


def _table(head: list[str], rows: list[list[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)
