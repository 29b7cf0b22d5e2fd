"""The demo's chat examples: same seed same examples, and no prompt or answer twice."""

from pathlib import Path

import pytest

from pesc.demo.chat_examples import draw_chat_examples, find_sdist
from pesc.storage.hub import cache_folder

needs_sdist = pytest.mark.skipif(
    not (cache_folder() / "packages" / "llamafactory-0.9.5.tar.gz").is_file(),
    reason="the llamafactory sdist is not in the cache",
)


@needs_sdist
def test_no_prompt_and_no_answer_comes_twice() -> None:
    examples = draw_chat_examples(cache_folder(), seed=3)
    prompts, answers = zip(*examples, strict=True)
    assert len(set(prompts)) == len(set(answers)) == len(examples)
    assert all(prompt.strip() and answer.strip() for prompt, answer in examples)
    assert all(80 <= len(prompt) + len(answer) <= 900 for prompt, answer in examples)
    assert not any("```" in answer for answer in answers)


@needs_sdist
def test_the_seed_decides_the_order_only() -> None:
    examples, other = draw_chat_examples(cache_folder(), seed=3), draw_chat_examples(cache_folder(), seed=4)
    assert examples == draw_chat_examples(cache_folder(), seed=3)
    assert examples != other
    assert sorted(examples) == sorted(other)


def test_missing_sdist_names_the_command(tmp_path: Path) -> None:
    for find in (find_sdist, lambda cache: draw_chat_examples(cache, seed=0)):
        with pytest.raises(FileNotFoundError, match=r"pip download .*llamafactory==0\.9\.5"):
            find(tmp_path)
