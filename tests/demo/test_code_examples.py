"""The demo's code examples: whole functions, their docstrings in the task only, no body twice."""

import ast

import pytest

from pesc.demo.code_examples import draw_code_examples


@pytest.fixture(scope="module")
def examples() -> list[tuple[str, str]]:
    return draw_code_examples(seed=3)


def test_no_two_functions_share_a_body(examples: list[tuple[str, str]]) -> None:
    answers = [answer for _, answer in examples]
    assert len(answers) > 70
    bodies = set()
    for answer in answers:
        (function,) = ast.parse(answer.removeprefix("```python\n").removesuffix("\n```")).body
        assert isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        assert ast.get_docstring(function) is None
        bodies.add(ast.dump(ast.Module(function.body, [])))
    assert len(bodies) == len(answers)


def test_the_task_holds_the_docstring_and_no_code(examples: list[tuple[str, str]]) -> None:
    for prompt, _ in examples:
        (function,) = ast.parse(prompt.partition("```python\n")[2].removesuffix("\n```")).body
        assert isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        assert ast.get_docstring(function)
        assert len(function.body) == 1


def test_the_seed_decides_the_examples(examples: list[tuple[str, str]]) -> None:
    other = draw_code_examples(seed=4)
    assert len(other) == len(examples)
    assert other != examples
