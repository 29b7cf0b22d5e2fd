"""The demo's chat rows: same seed same rows, and no prompt or answer twice."""

from pathlib import Path

import pytest

from pesc.demo.chat_rows import draw_chat_rows, find_sdist
from pesc.storage.hub import cache_folder

needs_sdist = pytest.mark.skipif(
    not (cache_folder() / "packages" / "llamafactory-0.9.5.tar.gz").is_file(),
    reason="the llamafactory sdist is not in the cache",
)


@needs_sdist
def test_no_prompt_and_no_answer_comes_twice() -> None:
    rows = draw_chat_rows(cache_folder(), seed=3)
    prompts, answers = zip(*rows, strict=True)
    assert len(set(prompts)) == len(set(answers)) == len(rows)
    assert all(prompt.strip() and answer.strip() for prompt, answer in rows)
    assert all(80 <= len(prompt) + len(answer) <= 900 for prompt, answer in rows)
    assert not any("```" in answer for answer in answers)


@needs_sdist
def test_the_seed_decides_the_order_only() -> None:
    rows, other = draw_chat_rows(cache_folder(), seed=3), draw_chat_rows(cache_folder(), seed=4)
    assert rows == draw_chat_rows(cache_folder(), seed=3)
    assert rows != other
    assert sorted(rows) == sorted(other)


def test_missing_sdist_names_the_command(tmp_path: Path) -> None:
    for find in (find_sdist, lambda cache: draw_chat_rows(cache, seed=0)):
        with pytest.raises(FileNotFoundError, match=r"pip download .*llamafactory==0\.9\.5"):
            find(tmp_path)
