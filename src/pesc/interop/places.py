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
    """A folder's own name, or the hub id of one in a hub's cache; a path that stays in this folder is left as it is."""
    if not os.path.isabs(place) and not place.startswith(("~", "..")):
        return place
    cached = [part.removeprefix("models--") for part in Path(place).parts if part.startswith("models--")]
    return cached[0].replace("--", "/", 1) if cached else Path(place).name


def public_recipe(recipe: dict[str, Any], base: str) -> dict[str, Any]:
    """A recipe without its output and its folders.

    Args:
        recipe: as recipe.yaml holds it.
        base: the name of the base in adapter.json, which tells a folder from a hub id.
    """
    shown = {section: _public(values) for section, values in recipe.items() if section != "output"}
    if isinstance(model := shown.get("model"), dict):
        model["name"] = public_name(base)
    return shown


def _public(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _public(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_public(inner) for inner in value]
    return public_name(value) if isinstance(value, str) else value


def public_results(results: Results) -> Results:
    """Results whose settings name no folder."""
    arms = [
        dataclasses.replace(arm, settings={key: public_name(value) for key, value in arm.settings.items()})
        for arm in results.arms
    ]
    return dataclasses.replace(results, model=public_name(results.model), arms=arms)
