"""The demo's code examples: documented functions of the standard library of the Python that runs."""

import ast
import os
import platform
import sysconfig
import textwrap
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random

SOURCE = f"functions with docstrings of the standard library of Python {platform.python_version()}"
LICENCE = "PSF-2.0"

_MIN_CHARS, _MAX_CHARS = 80, 900
_MAX_PER_MODULE = 60

_SKIPPED_FOLDERS = {
    "test", "tests", "idle_test", "idlelib", "lib2to3", "turtledemo", "ensurepip", "pydoc_data",
    "site-packages", "dist-packages", "lib-dynload", "__pycache__", "__phello__",
}  # fmt: skip

_CODE_PROMPTS = (
    "Complete this Python {kind} of {place}.",
    "Here is the signature and the docstring of a Python {kind} from {place}. Implement it.",
    "Implement the following {kind} of {place} in Python, as its docstring says.",
)


def draw_code_examples(seed: int) -> list[tuple[str, str]]:
    """All code examples as prompt and answer, no two with the same shape of syntax tree, in the seed's order."""
    found: dict[str, tuple[str, tuple[str, str]]] = {}
    rng = Random(f"{seed}-code")
    for module, path in _library_modules(Path(sysconfig.get_paths()["stdlib"])):
        for shape, kind, place, task, answer in _functions(module, path):
            if shape not in found:
                prompt = f"{rng.choice(_CODE_PROMPTS).format(kind=kind, place=place)}\n\n```python\n{task}\n```"
                found[shape] = (module.partition(".")[0], (prompt, f"```python\n{answer}\n```"))
    shuffled = list(found.values())
    rng.shuffle(shuffled)
    examples, taken = [], Counter[str]()
    for package, example in shuffled:
        # tkinter and turtle alone would otherwise be a sixth of the domain.
        if taken[package] < _MAX_PER_MODULE:
            taken[package] += 1
            examples.append(example)
    return examples


def _library_modules(root: Path) -> Iterator[tuple[str, Path]]:
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = sorted(s for s in subfolders if s not in _SKIPPED_FOLDERS and not s.startswith("config-"))
        for name in sorted(files):
            path = Path(folder, name)
            if path.suffix == ".py":
                yield ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"), path


def _functions(module: str, path: Path) -> Iterator[tuple[str, str, str, str, str]]:
    """The documented functions and methods of a file: shape of the body, kind, place, task and solution."""
    try:
        with tokenize.open(path) as file:
            source = file.read()
        tree = ast.parse(source)
    except (SyntaxError, UnicodeDecodeError):
        # The library keeps a few files that are broken on purpose.
        return
    lines = source.split("\n")
    places: list[tuple[str, str, ast.AST]] = [("function", f"the module `{module}`", tree)]
    classes = (node for node in tree.body if isinstance(node, ast.ClassDef))
    places += [("method", f"the class `{node.name}` in the module `{module}`", node) for node in classes]
    for kind, place, parent in places:
        for node in ast.iter_child_nodes(parent):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(node):
                task, answer = _task_and_answer(node, lines)
                if answer:
                    shape = " ".join(type(n).__name__ for b in node.body[1:] for n in ast.walk(b))
                    yield shape, kind, place, task, answer


def _task_and_answer(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> tuple[str, str]:
    """Signature with docstring, and the function without docstring; two empty strings if it teaches nothing.

    The docstring stands in the task only: a model that need not repeat it spends its loss on the code.
    """
    doc, *body = node.body
    end_of_doc = doc.end_lineno or doc.lineno
    start = min([node.lineno, *(d.lineno for d in node.decorator_list)])
    trivial = not body or all(isinstance(statement, ast.Pass | ast.Raise) for statement in body)
    # Where docstring and code share a line, lines cannot tell them apart.
    if trivial or body[0].lineno == end_of_doc or doc.lineno == node.lineno:
        return "", ""
    header = lines[start - 1 : doc.lineno - 1]
    task = textwrap.dedent("\n".join(header + lines[doc.lineno - 1 : end_of_doc]))
    code = list(lines[end_of_doc : node.end_lineno])
    while not code[0].strip():
        del code[0]
    answer = textwrap.dedent("\n".join(header + code)).rstrip()
    if len(answer) < _MIN_CHARS or len(task) + len("\n".join(code)) > _MAX_CHARS or not _parses(answer):
        return "", ""
    return task, answer


def _parses(code: str) -> bool:
    try:
        ast.parse(code)
    except SyntaxError:
        return False
    return True
