"""lm-eval's `HFLM` on a crafted folder, against our own forward; its archive has no test of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from checkpoints import tiny_dense
from families import disturb
from pesc import PescConfig, craft, load, load_tokenizer

PAIRS = [("one two", " three"), ("count to", " four, five"), ("", "six")]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    dense = tiny_dense(tmp_path / "dense")
    disturb(craft(load(dense), PescConfig(num_experts=4, adapter_dim=8))).save_pretrained(tmp_path / "crafted")
    load_tokenizer(dense).save_pretrained(tmp_path / "crafted")
    return tmp_path / "crafted"


@pytest.fixture
def hflm(folder: Path) -> HFLM:
    return HFLM(str(folder), device="cpu", batch_size=2, dtype="float32")


def requests(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(kind, {}, pair, index) for index, pair in enumerate(arguments)]


def test_loglikelihood_is_that_of_our_forward(folder: Path, hflm: HFLM) -> None:
    model, tokenizer = load(folder), load_tokenizer(folder)
    found = hflm.loglikelihood(requests("loglikelihood", PAIRS))
    for (context, continuation), (logprob, greedy) in zip(PAIRS, found, strict=True):
        prompt = tokenizer(context)["input_ids"] or [hflm.prefix_token_id]
        answer = tokenizer(continuation)["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        chosen = logits.log_softmax(-1).gather(-1, torch.tensor(answer)[:, None])
        assert logprob == pytest.approx(chosen.sum().item(), abs=1e-3)
        assert greedy == (logits.argmax(-1).tolist() == answer)


def test_generation_is_ours_up_to_the_stop(folder: Path, hflm: HFLM) -> None:
    tokenizer = load_tokenizer(folder)
    prompt = tokenizer("one two", return_tensors="pt")
    ours = tokenizer.decode(load(folder).generate(**prompt, max_new_tokens=8, do_sample=False)[0, 7:])
    asked = [("one two", {"until": until, "max_gen_toks": 8}) for until in ([], [ours[3]])]
    whole, stopped = hflm.generate_until(requests("generate_until", asked))
    assert whole == ours
    assert stopped == ours.split(ours[3])[0]


def test_a_task_of_each_kind_runs(tmp_path: Path, hflm: HFLM) -> None:
    rows = [{"question": f"{n} then", "options": [" a", " b"], "gold": n % 2} for n in range(4)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    shared = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.json")}},
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{gold}}",
    }
    choice = {"task": "choice", "output_type": "multiple_choice", "doc_to_choice": "{{options}}"}
    write = {"task": "write", "output_type": "generate_until", "generation_kwargs": {"until": [], "max_gen_toks": 4}}
    for task in (choice, write):
        (tmp_path / f"{task['task']}.yaml").write_text(json.dumps(shared | task))
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    results = simple_evaluate(hflm, tasks=["choice", "write"], task_manager=manager, bootstrap_iters=0)["results"]
    assert results["choice"]["acc,none"] in (0, 0.25, 0.5, 0.75, 1)
    assert results["write"]["exact_match,none"] == 0


def test_a_model_in_memory_scores_as_its_folder(folder: Path, hflm: HFLM) -> None:
    ours = HFLM(load(folder), tokenizer=load_tokenizer(folder), device="cpu")
    one, other = (lm.loglikelihood(requests("loglikelihood", PAIRS)) for lm in (ours, hflm))
    assert [pair[0] for pair in one] == pytest.approx([pair[0] for pair in other], abs=1e-4)
