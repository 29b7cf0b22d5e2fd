"""What a run says of itself, without the folders of the machine that it ran on: they are nobody else's business."""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path
from typing import Any

from pesc.report.results import Results


def is_hub_id(name: str) -> bool:
    """Whether a name is a hub's, such as org/name, by its form."""
    return re.fullmatch(r"\w[\w.-]*/[\w.-]+", name) is not None


def public_name(place: str) -> str:
    """A folder's own name, or the hub id of one in a hub's cache; what is no absolute path stays as it is."""
    if not os.path.isabs(place) and not place.startswith("~"):
        return place
    cached = [part.removeprefix("models--") for part in Path(place).parts if part.startswith("models--")]
    return cached[0].replace("--", "/", 1) if cached else Path(place).name


def public_recipe(recipe: dict[str, Any], base: str) -> dict[str, Any]:
    """A recipe without its output and its folders.

    Args:
        recipe: as recipe.yaml holds it.
        base: the public name of the base in adapter.json, where a folder cannot be taken for a hub id.
    """
    shown = public_values({section: values for section, values in recipe.items() if section != "output"})
    if isinstance(model := shown.get("model"), dict):
        model["name"] = base
    return shown


def public_values(values: Any) -> Any:
    """Nested values with every text as `public_name` has it."""
    if isinstance(values, dict):
        return {key: public_values(value) for key, value in values.items()}
    if isinstance(values, list):
        return [public_values(value) for value in values]
    return public_name(values) if isinstance(values, str) else values


def public_results(results: Results) -> Results:
    """Results whose settings name no folder."""
    arms = [dataclasses.replace(arm, settings=public_values(arm.settings)) for arm in results.arms]
    return dataclasses.replace(results, model=public_name(results.model), arms=arms)
