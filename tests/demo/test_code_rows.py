"""The demo's code rows: whole functions, their docstrings in the task only, no body twice."""

import ast

from pesc.demo.code_rows import draw_code_rows


def test_no_two_functions_share_a_body() -> None:
    answers = [answer for _, answer in draw_code_rows(seed=3)]
    assert len(answers) > 70
    bodies = set()
    for answer in answers:
        (function,) = ast.parse(answer.removeprefix("```python\n").removesuffix("\n```")).body
        assert isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        assert ast.get_docstring(function) is None
        bodies.add(ast.dump(ast.Module(function.body, [])))
    assert len(bodies) == len(answers)


def test_the_task_holds_the_docstring() -> None:
    for prompt, _ in draw_code_rows(seed=3)[:70]:
        task = prompt.partition("```python\n")[2].removesuffix("\n```")
        (function,) = ast.parse(task).body
        assert isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        assert ast.get_docstring(function)
        assert len(function.body) == 1


def test_the_seed_decides_the_rows() -> None:
    assert draw_code_rows(seed=3) == draw_code_rows(seed=3) != draw_code_rows(seed=4)
