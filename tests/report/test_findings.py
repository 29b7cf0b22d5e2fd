"""What a study says in words: no more than its numbers carry."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from pesc.report import findings
from studies import DENSE, DOMAINS, PESC, make_results

SEEDS = (-0.004, 0.0, 0.004)


def by_domain(*means: float) -> dict[str, float]:
    return dict(zip(DOMAINS, means, strict=True))


@pytest.mark.parametrize(
    ("means", "expected"),
    [
        ((-0.03, -0.04, -0.05), "PESC beats dense + LoRA in all 3 domains, over 3 seeds."),
        ((0.03, 0.04, 0.05), "PESC is behind dense + LoRA in all 3 domains, over 3 seeds."),
        ((-0.001, 0.0, 0.002), "No clear difference between PESC and dense + LoRA in all 3 domains, over 3 seeds."),
        (
            (0.03, 0.001, -0.05),
            "A mixed result over 3 seeds: PESC is better on math, worse on chat and not clearly different on code,"
            " against dense + LoRA.",
        ),
        (
            (-0.03, 0.001, -0.05),
            "A partial result over 3 seeds: PESC is better on chat and math and not clearly different on code, against"
            " dense + LoRA.",
        ),
        ((math.nan,) * 3, "No verdict: a held-out loss is not a finite number in all 3 domains, over 3 seeds."),
    ],
)
def test_the_verdict_follows_the_numbers(means: tuple[float, ...], expected: str) -> None:
    assert findings.headline(make_results(by_domain(*means), seed_shifts=SEEDS)) == expected


@pytest.mark.parametrize("means", [(-0.9, -0.9, -0.9), (0.9, 0.001, -0.9), (0.0, 0.0, 0.0)])
def test_one_seed_gives_no_verdict(means: tuple[float, ...]) -> None:
    results = make_results(by_domain(*means))
    assert findings.headline(results).startswith("No verdict from one seed: ")
    for case in findings.compare(results, results.others[0]):
        assert case.sentence.startswith("In this run: ")
        assert "standard error over examples" in case.sentence
        assert not any(word in case.sentence for word in ("better", "worse", "beats", "wins"))
    assert any(findings.ONE_SEED in caveat for caveat in findings.caveats(results))


def test_seeds_that_disagree_take_a_verdict_back() -> None:
    sure = make_results(by_domain(-0.05, -0.05, -0.05), seed_shifts=(-0.004, 0.0, 0.004))
    unsure = make_results(by_domain(-0.05, -0.05, -0.05), seed_shifts=(-0.06, 0.0, 0.06))
    assert findings.headline(sure).startswith("PESC beats")
    assert findings.headline(unsure).startswith("No clear difference")
    sentence = findings.compare(unsure, unsure.others[0])[0].sentence
    assert "between seeds 0.060" in sentence
    assert not any(findings.ONE_SEED in caveat for caveat in findings.caveats(unsure))


def test_the_numbers_of_a_sentence() -> None:
    results = make_results(by_domain(0.0, 0.0, -0.066))
    case = findings.compare(results, results.others[0])[2]
    assert case.sentence == (
        "In this run: the loss of PESC is lower by 0.066 (standard error over examples 0.002; 0.891 against 0.957)."
    )


def test_a_model_worse_than_the_base_is_named() -> None:
    results = make_results(by_domain(3.0, -0.1, -0.1))
    assert f"{PESC} lowers the held-out loss on code and math" in findings.lead(results)[0]
    helped = findings.lead(make_results())[0]
    assert helped == f"Against base, training lowers the held-out loss of {DENSE} and {PESC} on every domain."


def test_means_over_examples_and_over_tokens_that_disagree_are_named() -> None:
    results = make_results()
    base, dense, pesc = results.arms
    # Better on every example but the last, whose many tokens decide the loss of the domain.
    examples = [*results.examples[:23], replace(results.examples[23], tokens=100_000), *results.examples[24:]]
    nll = [loss - 0.5 * e.tokens for loss, e in zip(dense.runs[0].nll, examples, strict=True)]
    nll[23] = dense.runs[0].nll[23] + 0.1 * examples[23].tokens
    changed = replace(
        results, examples=examples, arms=[base, dense, replace(pesc, runs=[replace(pesc.runs[0], nll=nll)])]
    )
    assert "point opposite ways" in findings.compare(changed, dense)[0].sentence


def test_one_arm_and_an_arm_that_is_not_trained() -> None:
    results = make_results(by_domain(0.1, 0.1, 0.1))
    base, _, pesc = results.arms
    alone = replace(results, arms=[base])
    assert findings.headline(alone) == "Held-out loss of base: nothing is compared."
    assert findings.lead(alone) == []
    assert findings.caveats(alone)
    two = replace(results, arms=[base, pesc])
    assert findings.headline(two).startswith("No verdict from one seed: beside base, ")
    assert len(findings.lead(two)) == 1


def test_costs_and_unequal_sizes_are_told() -> None:
    results = make_results()
    assert findings.lead(results)[1] == (
        "PESC trains 22.72 M parameters, 4.7 times the 4.88 M of dense + LoRA, and took 270 s against 250 s, with"
        " 2.0 GB at its peak against 2.0 GB."
    )
    assert any("Not a control of equal size" in caveat for caveat in findings.caveats(results))


def test_left_out_examples_are_told() -> None:
    results = replace(make_results(), left_out=2)
    assert any("2 more are left out" in caveat for caveat in findings.caveats(results))
