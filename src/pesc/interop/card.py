"""The model card of an exported folder: the model, its training, its results and its use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from pesc.crafting.adapter import ADAPTER_JSON
from pesc.crafting.load import RECIPE, ModelRef
from pesc.interop.places import is_hub_id, public_name, public_recipe, public_results
from pesc.report.results import RESULTS, Results, read_results, to_json

CARD = "README.md"
_ADAPTER_ALONE = "This folder holds what was tuned alone: routers and experts, and LoRA if it had some."
_USE_ADAPTER = """## Use

```python
import pesc

model = pesc.load("path/of/this/folder")  # with its base, which it names; base="a/folder" if that has moved
tokenizer = pesc.load_tokenizer("path/of/this/folder")
```

Or, in a terminal: `pesc chat path/of/this/folder`."""
_USE = """## Use

```python
import pesc  # teaches transformers the model type
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/of/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/of/this/folder")
```

Or, in a terminal: `pesc chat path/of/this/folder`."""


def licence_of(folder: Path) -> str | None:
    """The licence that the card of a model's folder names; None if it names none."""
    value = _front_matter(folder).get("license")
    return value if isinstance(value, str) else None


def write_card(target: Path, ref: ModelRef) -> None:
    """Write README.md into an exported folder, named after it; and the run's recipe and results, if they are there.

    Args:
        target: the folder; if it holds an adapter, the card is the adapter's.
        ref: the model.

    Raises:
        ValueError: the recipe or the results cannot be read.
    """
    base = public_name(ref.settings.base_model) if ref.kind == "adapter" else ""
    recipe = public_recipe(_yaml(ref.run / RECIPE), base) if ref.run else None
    results = public_results(read_results(ref.run)) if ref.run and (ref.run / RESULTS).is_file() else None
    if recipe:
        (target / RECIPE).write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    if results:
        (target / RESULTS).write_text(to_json(results), encoding="utf-8")
    folded = not (target / ADAPTER_JSON).is_file()
    matter = _matter(base, ref.base.folder, crafted=ref.pesc_config is not None)
    if not folded:
        matter |= {"library_name": "pesc"}
    family = getattr(ref.config, "base_model_type", None) or ref.config.model_type
    shown = matter.get("base_model") or base or f"a dense {family} model"
    sections = [
        f"---\n{yaml.safe_dump(matter, sort_keys=False)}---",
        f"# {target.name}",
        _what(ref, shown, folded=folded),
        _USE if folded else _USE_ADAPTER,
        _training(recipe, results),
        _results(results),
        _intended_use(shown),
        _licence(licence_of(ref.base.folder), folded=folded),
    ]
    (target / CARD).write_text("\n\n".join(section for section in sections if section) + "\n", encoding="utf-8")


def _matter(base: str, base_folder: Path, *, crafted: bool) -> dict[str, Any]:
    own = _front_matter(base_folder)
    known = base if is_hub_id(base) else own.get("base_model")
    values: dict[str, Any] = {"license": licence_of(base_folder) or "unknown"}
    values |= {key: own[key] for key in ("license_name", "license_link", "language") if key in own}
    if isinstance(known, str) and is_hub_id(known):
        values["base_model"] = known
    values |= {"library_name": "transformers", "pipeline_tag": "text-generation"}
    return values | {"tags": ["pesc", "mixture-of-experts"] if crafted else ["lora"]}


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
    try:
        values = yaml.safe_load(path.read_bytes())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML ({' '.join(str(error).split())}): mend it, or remove it") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a mapping, found {type(values).__name__}: mend it, or remove it")
    return values


def _what(ref: ModelRef, base: str, *, folded: bool) -> str:
    pesc_config = ref.pesc_config
    lora = "which is folded into the weights" if folded else "which this folder holds, without its base"
    if pesc_config is None:
        return f"Made from {base}: tuned with LoRA, {lora}."
    layers = "every layer" if pesc_config.layers is None else f"layers {pesc_config.layers}"
    rows = {
        "experts in a layer, of these for each token": f"{pesc_config.num_experts}, {pesc_config.num_experts_per_tok}",
        "adapter dim": pesc_config.adapter_dim,
        "adapters read": "the FFN's output" if pesc_config.adapter_placement == "sequential" else "the FFN's input",
        "adapter": f"{pesc_config.adapter_activation}, scaled by {pesc_config.adapter_scaling:g}",
        "layers with experts": layers,
    }
    return (
        f"A mixture of experts made from {base} by parameter-efficient sparsity crafting (PESC, arXiv 2401.02731): all "
        "experts of a layer share the dense FFN and differ in a small adapter. "
        + ("LoRA, if it had some, is folded into the weights." if folded else _ADAPTER_ALONE)
        + "\n\n"
        + _table(["setting", "value"], [[key, value] for key, value in rows.items()])
    )


def _training(recipe: dict[str, Any] | None, results: Results | None) -> str:
    if recipe is None:
        return "## Training\n\nNo recipe was found beside the model."
    settings = recipe.get("data")
    train = settings.get("train", "unknown") if isinstance(settings, dict) else "unknown"
    sources = [str(source["path"]) for source in train] if isinstance(train, list) else [str(train)]
    data = f"Data: `{'`, `'.join(sources)}`; every answer of the assistant is trained on."
    lines = [f"- {s.domain}: {s.source} ({s.licence})" for s in results.sources] if results else []
    lines += [f"- {note}" for note in results.notes] if results else []
    listed = "\n\n" + "\n".join(lines) if lines else ""
    return f"## Training\n\n{data}{listed}\n\nRecipe:\n\n```yaml\n{yaml.safe_dump(recipe, sort_keys=False)}```"


def _results(results: Results | None) -> str:
    if results is None:
        return "## Results\n\nNo results were found beside the model."
    rows = [[arm.name, *(f"{results.losses(arm, d).mean():.4f}" for d in results.domains)] for arm in results.arms]
    table = _table(["held-out loss", *results.domains], rows)
    return f"## Results\n\n{table}\n\nLoss is nats a token on examples kept out of training; lower is better."


def _intended_use(base: str) -> str:
    return (
        "## Intended use and limits\n\n"
        f"Research on, and use of, small-cost mixtures of experts, within what its base ({base}) is meant and allowed "
        "for. The model has its base's knowledge, languages, biases and errors, and those of the data it was tuned on. "
        "It was not tested for safety: do not let it act or advise unwatched if an error could harm someone."
    )


def _licence(licence: str | None, *, folded: bool) -> str:
    if licence:
        files = " Its files, if it had some, lie in this folder." if folded else ""
        return f"## Licence\n\nThe base's: {licence}.{files}"
    return (
        "## Licence\n\nThe base's, whose card was not found beside its weights: look it up, and write it into the "
        "first lines of this file, before you share the model."
    )


def _table(head: list[str], rows: list[list[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)
