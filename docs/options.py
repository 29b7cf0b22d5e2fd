"""Writes the options of every verb, and the settings of a recipe, as Markdown that the pages include.

`make docs` runs it. Texts and defaults come from the code, so the pages cannot disagree with `--help`.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from pesc.cli import app
from pesc.training.recipe import Recipe

_ENTRY = re.compile(r"\* `(?P<name>\S+?)(, \S+)?(?P<kind> \S+)?`: (?P<text>.*?)(?P<notes>( \*+\[.+?\]\*+)*)")
_KINDS = {
    "INT": "integer",
    "INT...": "integers",
    "INT|INT...": "integer, or several",
    "FLOAT": "number",
    "STR": "text",
    "STR...": "texts",
    "PATH": "path",
    "STR|SOURCESETTINGS...": "text, or a list of sources",
    "CHOICE": "one",
    "CHOICE...": "some",
}


def options_of_verbs() -> dict[str, str]:
    """For each verb, its usage and its options as a Markdown definition list."""
    sections = app.generate_docs().split("\n## pesc ")[1:]
    return {section.split("\n", 1)[0]: _usage(section) + _definitions(section) for section in sections}


def settings_of_recipe() -> str:
    """The keys of a recipe as a Markdown definition list."""
    reader = App(name="recipe", default_parameter=Parameter(name_transform=lambda name: name, negative=""))

    @reader.default
    def read(recipe: Annotated[Recipe, Parameter(name="*")]) -> None: ...

    return _definitions(reader.generate_docs()).replace("`--", "`")


def _usage(section: str) -> str:
    return "```" + section.split("```")[1] + "```\n\n"


def _definitions(section: str) -> str:
    # An entry's text may run over several lines, all but the first indented.
    lines = re.sub(r"\n +(?=\S)", " ", section).splitlines()
    return "\n".join(_definition(line) for line in lines if line.startswith("* "))


def _definition(line: str) -> str:
    entry = _ENTRY.fullmatch(line)
    assert entry, line
    notes = re.findall(r" \*+\[(.+?)\]\*+", entry["notes"])
    notes = [re.sub(r"['\[\]]", "", note) for note in notes if note != "default: False"]
    shown = " · ".join([_KINDS[entry["kind"].strip()], *notes] if entry["kind"] else notes)
    shown = f" *{shown}*".replace(" · choices:", " of") if shown else ""
    return f"`{entry['name']}`{shown}\n:   {entry['text']}\n"


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in {**options_of_verbs(), "recipe": settings_of_recipe()}.items():
        (folder / f"{name}.md").write_text(text)
