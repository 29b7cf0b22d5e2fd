"""README and docs against the code: commands parse, paths and links exist, and every page is in the site's menu."""

from __future__ import annotations

import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from cyclopts import CycloptsError, MissingArgumentError

import pesc
from pesc.cli import app
from pesc.interop.formats import BEST_STOCK, FORMATS
from pesc.training.recipe import load_recipe

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")), *sorted(DOCS.rglob("*.md"))]
VERBS = [name for name in app if not name.startswith("-")]
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.DOTALL | re.MULTILINE)
# What a shell does with a command's output, or after it, is not the command's.
ENDS = {"|", "&&", ";", "&", ">"}


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(language: str) -> Iterator[tuple[str, str]]:
    for page in PAGES:
        yield from ((name_of(page), body) for kind, body in FENCE.findall(page.read_text()) if kind == language)


def shell_commands() -> Iterator[tuple[str, list[str]]]:
    for page, body in blocks("bash"):
        for line in body.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if "pesc" in words:
                words = words[words.index("pesc") + 1 :]
                end = next((i for i, word in enumerate(words) if word in ENDS), len(words))
                yield page, words[:end]


def named_commands() -> Iterator[tuple[str, list[str]]]:
    """Commands in running text, which may leave out arguments."""
    for page in PAGES:
        for code in re.findall(r"`(pesc [^`]+)`", FENCE.sub("", page.read_text())):
            yield name_of(page), shlex.split(code)[1:]


@pytest.mark.parametrize(("page", "words"), list(shell_commands()), ids=lambda value: str(value)[:80])
def test_shell_commands_parse(page: str, words: list[str]) -> None:
    _, bound, unused = app.parse_args(words, exit_on_error=False, print_error=False)
    assert not unused
    if words[0] == "train":
        load_recipe(ROOT / bound.arguments["recipe"], bound.arguments.get("changes", ()))
    if words[0] == "export":
        assert bound.arguments.get("format", "pesc") in (BEST_STOCK, *FORMATS)


@pytest.mark.parametrize(("page", "words"), list(named_commands()), ids=lambda value: str(value)[:80])
def test_named_commands_exist(page: str, words: list[str]) -> None:
    try:
        app.parse_args(words, exit_on_error=False, print_error=False)
    except MissingArgumentError:
        assert words[0] in VERBS


def test_a_wrong_command_would_be_seen() -> None:
    for words in (["tran"], ["info", "runs/demo", "--jason"], ["serve", "runs/demo", "--engine", "tgi"]):
        with pytest.raises(CycloptsError):
            app.parse_args(words, exit_on_error=False, print_error=False)


@pytest.mark.parametrize(("page", "code"), list(blocks("python")), ids=lambda value: value.splitlines()[0][:60])
def test_python_compiles_and_uses_public_names(page: str, code: str) -> None:
    compile(code, page, "exec")
    used = set(re.findall(r"\bpesc\.(\w+)", code))
    assert used <= set(pesc.__all__)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_repository_paths_exist(page: Path) -> None:
    text = page.read_text()
    named = re.findall(r"(?<![\w/.-])(?:src|docs|tests|recipes|benchmarks|engines)/[\w./*-]*\w/?", text)
    named += [f"src/{module}" for module in re.findall(r"(?<![\w/.-])pesc/[\w/]+\.py", text)]
    assert not [path for path in named if not list(ROOT.glob(path.rstrip("/")))]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_and_pictures_exist(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", FENCE.sub("", page.read_text()))
    local = [target for target in targets if not re.match(r"https?://", target)]
    assert not [target for target in local if not (page.parent / target).exists()]


def test_every_page_is_in_the_menu() -> None:
    def pages(entry: object) -> Iterator[str]:
        if isinstance(entry, str):
            yield entry
        else:
            for part in entry.values() if isinstance(entry, dict) else entry:
                yield from pages(part)

    menu = list(pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    assert sorted(menu) == sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))


def test_every_verb_has_a_page_with_its_options() -> None:
    for verb in VERBS:
        assert f'--8<-- "{verb}.md"' in (DOCS / "commands" / f"{verb}.md").read_text()
        assert f"({verb}.md)" in (DOCS / "commands" / "index.md").read_text()


def test_every_option_and_setting_has_an_entry() -> None:
    options = load_options()
    texts = options.options_of_verbs()
    assert sorted(texts) == sorted(VERBS)
    for verb in VERBS:
        for argument in app[verb].assemble_argument_collection():
            shown = f"`{argument.name}`" in texts[verb] or f"`{argument.name.lstrip('-').upper()}`" in texts[verb]
            assert shown or not argument.show, (verb, argument.name)
    recipe = options.settings_of_recipe()
    for setting in ("model.name", "pesc.adapter_dim", "lora.r", "data.train", "training.seed", "output.folder"):
        assert f"`{setting}`" in recipe


def load_options() -> ModuleType:
    spec = importlib.util.spec_from_file_location("options", DOCS / "options.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_readmes_tree_is_the_tree() -> None:
    tree = next(body for page, body in blocks("") if page == "README.md" and body.startswith("src/pesc/"))
    rooms = re.findall(r"^  (\S+)", tree, re.MULTILINE)
    assert not [name for name in rooms if not (ROOT / "src/pesc" / name).exists()]
    there = {path.name + "/" for path in (ROOT / "src/pesc").iterdir() if (path / "__init__.py").is_file()}
    assert there <= set(rooms)
