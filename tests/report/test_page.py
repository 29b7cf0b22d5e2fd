"""The report of a finished run, from synthetic runs whose outcome we choose."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pesc.report.findings import Specialisation, specialisation
from pesc.report.page import write_report
from pesc.report.results import Routing, read_run

DOMAINS = ["chat", "code", "math"]
Edit = Callable[[Any], None]


def metrics(steps: int, seed: int, sparse: bool, layers: int) -> list[dict[str, float]]:
    rng = np.random.default_rng(seed)
    lines = []
    for step in range(1, steps + 1):
        line = {
            "step": step,
            "loss": 1.15 + math.exp(-step / 18) + 0.08 * rng.standard_normal(),
            "learning_rate": 2e-4,
            "grad_norm": 1.2,
            "tokens": 512 * step,
            "tokens_per_second": 190 + 5 * rng.standard_normal(),
            "elapsed": 2.7 * step,
        }
        if sparse:
            drift = 1 - math.exp(-step / 30)
            line |= {
                "aux_loss": 2 * layers * (1.08 - 0.06 * drift + 0.004 * rng.standard_normal()),
                "balance": 0.955 + 0.03 * drift + 0.002 * rng.standard_normal(),
            }
        lines.append(line)
    return lines


def shares(domains: list[str], layers: int, experts: int, seed: int) -> dict[str, list[list[float] | None]]:
    rng = np.random.default_rng(seed)
    common = 0.3 * rng.standard_normal((layers, experts))
    found: dict[str, list[list[float] | None]] = {}
    for domain in domains:
        logits = common + np.linspace(0.05, 0.35, layers)[:, None] * rng.standard_normal((layers, experts))
        found[domain] = (np.exp(logits) / np.exp(logits).sum(1, keepdims=True)).tolist()
    return found


def results(domains: list[str], means: list[float], error: float) -> dict[str, Any]:
    start = dict(zip(domains, [2.113, 1.421, 1.207] * 3, strict=False))
    dense = {domain: loss - 0.25 for domain, loss in start.items()}
    pesc = {domain: dense[domain] + mean for domain, mean in zip(domains, means, strict=True)}
    sizes = {"total": 134_515_008, "active": 134_515_008, "trained": 0}
    return {
        "domains": domains,
        "models": [
            {"name": "base", "loss": start, "parameters": sizes},
            {"name": "dense + LoRA", "loss": dense, "parameters": sizes | {"trained": 4_884_480}},
            {
                "name": "PESC",
                "loss": pesc,
                "parameters": {"total": 152_350_848, "active": 139_107_648, "trained": 22_720_320},
            },
        ],
        "held_out_tokens": dict.fromkeys(domains, 3012),
        "held_out_rows": dict.fromkeys(domains, 24),
        "setup": {
            "model": "smollm2-135m-instruct",
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "adapter_dim": 64,
            "lora_r": 16,
            "steps": 100,
            "tokens": 51200,
            "seed": 0,
            "seconds": {"dense": 250.1, "pesc": 270.3},
            "peak_memory_gb": {"dense": 1.9, "pesc": 2.2},
            "machine": "2 cores, x86_64, no accelerator",
        },
        "data": {
            "sources": [
                {"domain": domain, "source": f"rows about {domain}", "licence": "Apache-2.0"} for domain in domains
            ],
            "notes": ["Rows longer than 512 tokens were left out."],
        },
        "uncertainty": {
            "PESC - dense + LoRA": {d: [m, error] for d, m in zip(domains, means, strict=True)},
            "PESC - base": {domain: [-0.25, 0.02] for domain in domains},
        },
    }


def make_run(
    run: Path,
    means: list[float] | None = None,
    error: float = 0.006,
    domains: list[str] = DOMAINS,
    layers: int = 4,
    experts: int = 8,
    steps: int = 30,
) -> Path:
    (run / "dense").mkdir(parents=True)
    for name, seed, sparse in (("metrics.jsonl", 1, True), ("dense/metrics.jsonl", 2, False)):
        text = "\n".join(json.dumps(line) for line in metrics(steps, seed, sparse, layers))
        (run / name).write_text(text + "\n")
    means = [-0.031, -0.044, -0.052] if means is None else means
    answers = [
        {
            "domain": domain,
            "prompt": f"A question about {domain}?",
            "reference": "Forty-two.",
            "base": "I do not know.",
            "dense": "42",
            "pesc": "It is 42.",
        }
        for domain in domains
    ]
    for name, data in (
        ("results.json", results(domains, means, error)),
        (
            "routing.json",
            {"num_experts": experts, "num_experts_per_tok": 2, "shares": shares(domains, layers, experts, 3)},
        ),
        ("answers.json", answers),
    ):
        (run / name).write_text(json.dumps(data))
    return run


def edit(run: Path, name: str, change: Edit) -> None:
    data = json.loads((run / name).read_text())
    change(data)
    (run / name).write_text(json.dumps(data))


def page(run: Path) -> str:
    target = write_report(run)
    assert target == run / "report.html"
    return target.read_text(encoding="utf-8")


def verdict(text: str) -> str:
    found = re.search(r"<h1>(.*?)</h1>", text)
    assert found
    return found[1]


@pytest.mark.parametrize(
    ("means", "expected"),
    [
        ([-0.03, -0.04, -0.05], "Sparse wins: PESC beats dense + LoRA in all 3 domains."),
        ([0.03, 0.04, 0.05], "Sparse loses: PESC is behind dense + LoRA in all 3 domains."),
        ([-0.01, 0.0, 0.011], "No clear difference between PESC and dense + LoRA in all 3 domains."),
        (
            [0.03, 0.001, -0.05],
            "A mixed result: PESC is better on math, worse on chat and not clearly different"
            " on code, against dense + LoRA.",
        ),
        (
            [-0.03, 0.001, -0.05],
            "A partial result: PESC is better on chat and math and not clearly different on"
            " code, against dense + LoRA.",
        ),
        ([math.nan] * 3, "No verdict: a held-out loss is not a finite number in all 3 domains."),
    ],
)
def test_the_verdict_follows_the_numbers(tmp_path: Path, means: list[float], expected: str) -> None:
    assert verdict(page(make_run(tmp_path / "run", means))) == expected


def test_one_row_is_never_a_clear_win(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", error=0.0)
    edit(run, "results.json", lambda data: data["held_out_rows"].update(dict.fromkeys(DOMAINS, 1)))
    assert verdict(page(run)).startswith("No clear difference")


def test_a_model_worse_than_the_base_is_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    edit(run, "results.json", lambda data: data["models"][2]["loss"].update(chat=9.0))
    text = page(run)
    assert "PESC lowers the held-out loss on code and math but not on chat" in text
    assert "point opposite ways" in text


def test_the_page_needs_nothing_from_outside(tmp_path: Path) -> None:
    text = page(make_run(tmp_path / "run"))
    assert "http" not in text
    assert not re.search(r"<(script|link|iframe|img)\b|@import|@font-face", text)
    assert not re.search(r"""(src|href)=["'](?!#)""", text)
    ids = re.findall(r'\bid="([^"]*)"', text)
    assert len(ids) == len(set(ids))
    used = re.findall(r'(?:href="|url\()#([^")]*)', text)
    assert used and set(used) <= set(ids)


def test_the_same_run_gives_the_same_page(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    assert page(run) == page(run)


def test_every_colour_of_a_chart_is_a_role_of_the_page(tmp_path: Path) -> None:
    text = page(make_run(tmp_path / "run"))
    charts = "".join(re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL))
    assert not re.search(r"#[0-9a-f]{6}\b", charts)
    assert all(f"--{role}:" in text for role in re.findall(r"var\(--(\w+)\)", charts))


def test_untrusted_text_is_escaped(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", domains=["$chat_{<b>", "code", "math"])
    attack = "<script>alert('x')</script></pre>"
    edit(run, "answers.json", lambda data: data[0].update(pesc=attack, prompt=attack))
    text = page(run)
    assert "<script" not in text
    assert "&lt;script&gt;alert" in text
    assert "<b>chat" not in text and "$chat_{&lt;b&gt;" in text


def test_a_heat_map_for_every_domain(tmp_path: Path) -> None:
    text = page(make_run(tmp_path / "run"))
    for kind in ("heat-map", "shift-map"):
        figures = re.findall(rf'class="{kind}" data-domain="(\w+)".*?(<svg.*?</svg>)', text, flags=re.DOTALL)
        assert [domain for domain, _ in figures] == DOMAINS
        assert all("var(--heat" in chart for _, chart in figures)


def test_layers_may_differ_and_lack_experts(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", means=[-0.1, -0.1, -0.1, -0.1], domains=[*DOMAINS, "law"], layers=3)

    def uneven(data: dict[str, Any]) -> None:
        data["num_experts"] = [8, None, 4]
        for rows in data["shares"].values():
            rows[1] = None
            rows[2] = [1.0, 0.0, 0.0, 0.0]

    edit(run, "routing.json", uneven)
    text = page(run)
    assert "in all 4 domains" in text
    assert "Layers without experts, left empty: 1." in text


def test_one_domain_and_one_step(tmp_path: Path) -> None:
    text = page(make_run(tmp_path / "run", means=[0.1], domains=["chat"], layers=1, steps=1))
    assert verdict(text) == "Sparse loses: PESC is behind dense + LoRA on chat."
    assert "nothing to compare the routing with" in text


@pytest.mark.parametrize("value", ["NaN", "Infinity", "null"])
def test_what_is_not_finite_is_told_not_fatal(tmp_path: Path, value: str) -> None:
    run = make_run(tmp_path / "run")
    for name in ("metrics.jsonl", "dense/metrics.jsonl"):
        lines = (run / name).read_text().splitlines()
        lines[3] = re.sub(r'("\w+"): [-\d.e]+', rf"\1: {value}", lines[3])
        (run / name).write_text("\n".join(lines))
    assert "Of the 30 logged losses of PESC, 1 are not finite." in page(run)


def test_a_run_that_diverged_still_gets_its_page(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", means=[math.nan] * 3)
    text = re.sub(
        r'("(?:loss|aux_loss|balance|tokens_per_second)"): [-\d.e]+',
        r"\1: NaN",
        (run / "metrics.jsonl").read_text(),
    )
    (run / "metrics.jsonl").write_text(text)
    assert "not finite" in page(run)


@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "dense/metrics.jsonl", "results.json", "routing.json", "answers.json"]
)
def test_a_missing_or_broken_file_is_named(tmp_path: Path, name: str) -> None:
    run = make_run(tmp_path / "run")
    (run / name).write_text("{not json")
    with pytest.raises(ValueError, match=re.escape(name)):
        write_report(run)
    (run / name).unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(name)):
        write_report(run)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("results.json", lambda d: d.pop("uncertainty"), "uncertainty is missing"),
        ("results.json", lambda d: d["uncertainty"].pop("PESC - dense + LoRA"), "no entry 'PESC - dense"),
        ("results.json", lambda d: d["models"].pop(), "no entry named PESC"),
        ("results.json", lambda d: d["setup"].pop("seed"), "setup.seed is missing"),
        (
            "results.json",
            lambda d: d["models"][1]["loss"].pop("code"),
            r"\[dense \+ LoRA\].loss.code is missing",
        ),
        ("routing.json", lambda d: d["shares"].pop("math"), "shares.math is missing"),
        ("routing.json", lambda d: d["shares"]["math"][2].pop(), r"shares.math\[2\] must be 8 numbers"),
        ("routing.json", lambda d: d["shares"]["math"].pop(), "shares.math has 3 layers"),
        ("routing.json", lambda d: d["shares"]["math"].__setitem__(0, [1.0] * 8), "sums to 8, not 1"),
        (
            "routing.json",
            lambda d: d["shares"]["math"].__setitem__(0, None),
            "some domains and none in others",
        ),
        ("answers.json", lambda d: d[1].pop("dense"), r"\[1\].dense is missing"),
    ],
)
def test_a_malformed_file_says_what_is_wrong(tmp_path: Path, name: str, change: Edit, message: str) -> None:
    run = make_run(tmp_path / "run")
    edit(run, name, change)
    with pytest.raises(ValueError, match=f"^{re.escape(name)}: .*{message}"):
        write_report(run)


def test_all_faults_come_in_one_error(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    edit(run, "results.json", lambda data: [data["setup"].pop(key) for key in ("seed", "machine")])
    with pytest.raises(ValueError, match="setup.seed is missing; setup.machine is missing"):
        read_run(run)


def divergence(*rows: list[float]) -> Specialisation:
    names = [str(index) for index in range(len(rows))]
    routing = Routing([2], {name: [np.array(row)] for name, row in zip(names, rows, strict=True)})
    return specialisation(routing, dict.fromkeys(names, 1000))


def test_specialisation_runs_from_nothing_to_the_full_bits() -> None:
    assert divergence([0.5, 0.5], [0.5, 0.5]).mean == 0
    apart = divergence([1.0, 0.0], [0.0, 1.0])
    assert apart.mean == apart.most == 1
    assert apart.largest[3:] == (1.0, 0.5)


def test_the_noise_is_what_chance_gives() -> None:
    rng = np.random.default_rng(0)
    drawn = [divergence(*(rng.multinomial(2000, [0.125] * 8) / 2000 for _ in range(3))) for _ in range(200)]
    assert np.mean([case.mean for case in drawn]) == pytest.approx(drawn[0].noise, rel=0.1)
