"""Crafted models in vLLM compute what they compute in transformers.

Runs in an environment with vLLM. vLLM itself runs in child processes (this file as a script), as it changes
transformers' classes where it builds on them; expected values are transformers' here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.engines
pytest.importorskip("vllm")

_TOLERANCE = 1e-4
_IN_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
_SMALL = {
    "vocab_size": 96,
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_HEAD = {"head_dim": 32}
# vLLM has classes of its own for the first five; it builds the last two on transformers' modules.
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": _HEAD,
    "Gemma3": _HEAD | {"sliding_window": 8, "query_pre_attn_scalar": 32},
    "Phi3": {},
    "Starcoder2": {"use_bias": True},
    "Olmo2": {},
}
FORMS = {
    "sequential": {"adapter_placement": "sequential", "adapter_activation": "gelu"},
    "parallel": {"adapter_placement": "parallel", "adapter_activation": "swiglu", "adapter_scaling": 0.5},
}


def save_tiny(folder: Path, family: str, **settings: Any) -> Path:
    """A crafted random model of a family whose experts and biases matter."""
    import transformers

    from pesc import PescConfig, craft

    config_name = "Gemma3TextConfig" if family == "Gemma3" else f"{family}Config"
    torch.manual_seed(0)
    config = getattr(transformers, config_name)(**_SMALL, **FAMILIES.get(family, {}))
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    model = craft(model, PescConfig(**({"num_experts": 4, "adapter_dim": 24} | settings)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.2)
            elif "norm" not in name:
                parameter.normal_(std=0.1)
    model.save_pretrained(folder)
    return folder


def save_embedded(folder: Path, form: str) -> Path:
    """The embedded model, crafted, with random experts that change what it says."""
    from transformers import AutoModelForCausalLM

    from pesc import PescConfig, craft
    from pesc.crafting.embedded import embedded_folder
    from pesc.crafting.surgery import expert_parameters

    dense = AutoModelForCausalLM.from_pretrained(embedded_folder(), dtype=torch.float32)
    model = craft(dense, PescConfig(num_experts=8, num_experts_per_tok=2, adapter_dim=64, **FORMS[form]))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in expert_parameters(model).items():
            if "router" in name or name.endswith("down_proj"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.03)
    model.save_pretrained(folder)
    return folder


def prompts(vocabulary: int, *lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, vocabulary, (length,), generator=generator).tolist() for length in lengths]


def run_vllm(cases: dict[str, dict[str, Any]], folder: Path, **environment: str) -> dict[str, Any]:
    """Run cases in vLLM in a child process; see `child`."""
    job, out = folder / "job.json", folder / "out.json"
    job.write_text(json.dumps(cases))
    settings = {
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
    }
    command = [sys.executable, __file__, str(job), str(out)]
    subprocess.run(command, check=True, env=os.environ | settings | environment)
    return json.loads(out.read_text())


def check_against_transformers(folder: str, results: list[dict[str, Any]]) -> None:
    """Log-probabilities of every token within the tolerance, and each new token the likeliest one."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for result in results:
        ids = torch.tensor([result["prompt"] + result["new"]])
        with torch.no_grad():
            logprobs = model(ids).logits[0].log_softmax(-1)
        expected = logprobs[:-1].gather(1, ids[0, 1:, None])[:, 0]
        found = torch.tensor(result["logprobs"])
        assert (found - expected[-len(found) :]).abs().max() < _TOLERANCE
        assert result["new"] == logprobs[len(result["prompt"]) - 1 : -1].argmax(-1).tolist()


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Everything that one child runs, by name."""
    from safetensors.torch import load_file, save_file
    from transformers import BioGptConfig

    from pesc import PescConfig
    from pesc.crafting.configuration import crafted_config

    root = tmp_path_factory.mktemp("models")
    found: dict[str, dict[str, Any]] = {}
    for family in FAMILIES:
        for form in FORMS if family in ("Llama", "Qwen2") else list(FORMS)[len(family) % 2 :][:1]:
            folder = save_tiny(root / f"{family}-{form}", family, **FORMS[form])
            found[f"{family}-{form}"] = {"model": str(folder), "prompts": prompts(96, 3, 40, 11), "new": 30}
    uneven = {"layers": [0, 2], "num_experts": [4, 3], "num_experts_per_tok": [1, 3], "adapter_dim": [24, 7]}
    folder = save_tiny(root / "uneven", "Llama", **uneven)
    found["uneven"] = {"model": str(folder), "prompts": prompts(96, 1, 20), "new": 10}
    for form in FORMS:
        folder = save_embedded(root / f"embedded-{form}", form)
        found[f"embedded-{form}"] = {"model": str(folder), "prompts": prompts(40000, 140, 5), "new": 200}
    found["embedded-sequential"]["again"] = [found["embedded-sequential"]["prompts"][0][:-2] + [17, 18, 19]]

    folder = save_tiny(root / "broken", "Llama")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.experts.up_proj"], tensors["model.layers.0.self_attn.q_proj.weight"]
    tensors["model.layers.2.mlp.router.weight"] = torch.zeros(5, 128)
    tensors["model.layers.0.mlp.experts.extra"] = torch.zeros(1)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    found["broken"] = {"model": str(folder), "prompts": [], "new": 0}
    config = crafted_config(BioGptConfig(), PescConfig())
    config.architectures = ["PescForCausalLM"]
    config.save_pretrained(root / "unknown")
    found["unknown"] = {"model": str(root / "unknown"), "prompts": [], "new": 0}
    return found


@pytest.fixture(scope="module")
def results(cases: dict[str, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_vllm(cases, tmp_path_factory.mktemp("job"), **_IN_PROCESS)


def test_every_family_computes_what_transformers_does(cases: dict[str, Any], results: dict[str, Any]) -> None:
    tiny = [name for name in cases if name.split("-")[0] in FAMILIES or name == "uneven"]
    assert len(tiny) == len(FAMILIES) + 3
    for name in tiny:
        assert "error" not in results[name], (name, results[name]["error"])
        assert results[name]["class"].startswith("Pesc")
        check_against_transformers(cases[name]["model"], results[name]["first"])


@pytest.mark.parametrize("form", FORMS)
def test_embedded_model_says_the_same_over_long_generations(
    form: str, cases: dict[str, Any], results: dict[str, Any]
) -> None:
    result = results[f"embedded-{form}"]
    assert "error" not in result, result["error"]
    assert [len(row["new"]) for row in result["first"]] == [200, 200]
    check_against_transformers(cases[f"embedded-{form}"]["model"], result["first"])


def test_a_shared_prefix_comes_from_the_cache_and_changes_nothing(
    cases: dict[str, Any], results: dict[str, Any]
) -> None:
    again = results["embedded-sequential"]["again"]
    assert again[0]["cached"] >= 128
    check_against_transformers(cases["embedded-sequential"]["model"], again)


def test_bad_checkpoints_list_every_mismatch_at_once(results: dict[str, Any]) -> None:
    message = results["broken"]["error"]
    assert "missing: model.layers.1.mlp.experts.up_proj" in message
    assert "missing: model.layers.0.self_attn.q_proj.weight" in message
    assert "unexpected: model.layers.0.mlp.experts.extra" in message
    assert "wrong shape: model.layers.2.mlp.router.weight is [5, 128] in the file, [4, 128] by the config" in message


def test_a_family_that_vllm_does_not_know_is_refused(results: dict[str, Any]) -> None:
    message = results["unknown"]["error"]
    assert "base_model_type ('biogpt') must be a family of vLLM's" in message
    assert "pesc serve" in message


def test_two_tensor_parallel_ranks_compute_what_transformers_does(tmp_path: Path) -> None:
    cases = {}
    # Of Cohere's FFN, each rank returns only its part of the sum over ranks.
    for family in ("Llama", "Cohere"):
        folder = save_tiny(tmp_path / family, family)
        cases[family] = {"model": str(folder), "prompts": prompts(96, 3, 20), "new": 3, "ranks": 2}
    found = run_vllm(cases, tmp_path, **_IN_PROCESS)
    for family, case in cases.items():
        assert "error" not in found[family], found[family]["error"]
        check_against_transformers(case["model"], found[family]["first"])


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("tokens", "experts", "chosen"), [(1, 4, 2), (7, 5, 1), (5, 3, 3), (64, 8, 2)])
def test_grouped_experts_equal_the_loop(gated: bool, tokens: int, experts: int, chosen: int) -> None:
    from pesc.vllm_plugin.experts import grouped_experts

    bank = _bank(gated, experts)
    first, down = bank.parameters()
    hidden = torch.randn(tokens, 16)
    weights, index = torch.randn(tokens, experts).softmax(-1).topk(chosen)
    found = grouped_experts(hidden, first, down, weights, index, gated)
    assert torch.allclose(found, _oracle(bank, hidden, index, weights), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_parts_of_all_ranks_sum_to_the_whole(gated: bool, ranks: int) -> None:
    from pesc.vllm_plugin.experts import Experts, grouped_experts

    bank = _bank(gated, 4)
    hidden = torch.randn(9, 16)
    weights, index = torch.randn(9, 4).softmax(-1).topk(2)
    total = torch.zeros(9, 16)
    for rank in range(ranks):
        part = Experts(16, _layer(gated), rank, ranks)
        for name, value in bank.named_parameters():
            part.load(name, value)
        first = getattr(part, part.first_name)
        assert first.shape[1] * ranks == 12 * (1 + gated)
        total += grouped_experts(hidden, first, part.down_proj, weights, index, gated)
    assert torch.allclose(total, _oracle(bank, hidden, index, weights), rtol=1e-4, atol=1e-4)


def test_adapters_that_cannot_be_split_over_the_ranks_are_refused() -> None:
    from pesc.vllm_plugin.experts import Experts

    with pytest.raises(ValueError, match=r"adapter_dim \(12\) must be a multiple of the tensor parallel size \(8\)"):
        Experts(16, _layer(gated=False), 0, 8)


def _layer(gated: bool) -> Any:
    from pesc import PescConfig

    activation = "swiglu" if gated else "gelu"
    return PescConfig(num_experts=4, adapter_dim=12, adapter_activation=activation).for_layers(1)[0]


def _bank(gated: bool, experts: int) -> Any:
    from transformers import LlamaConfig

    from pesc.method.experts import build_experts

    activation = "swiglu" if gated else "gelu"
    bank = build_experts(
        LlamaConfig(), activation=activation, num_experts=experts, hidden_size=16, adapter_dim=12
    ).requires_grad_(False)
    for parameter in bank.parameters():
        parameter.normal_()
    return bank


def _oracle(bank: Any, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    bank.config._experts_implementation = "eager"
    return bank(hidden, index, weights)


def child(cases: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Run each case: greedy generation of `new` tokens for `prompts` together, then for `again`.

    Returns:
        For each case its rows ("first", "again": prompt, new, logprobs, cached) and "class", or its "error".
    """
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    found: dict[str, Any] = {}
    for name, case in cases.items():
        llm = None
        try:
            llm = LLM(
                case["model"],
                dtype="float32",
                enforce_eager=True,
                max_model_len=512,
                max_num_seqs=4,
                skip_tokenizer_init=True,
                tensor_parallel_size=case.get("ranks", 1),
            )
            greedy = {"temperature": 0, "max_tokens": case["new"], "logprobs": 0, "ignore_eos": True}
            whole = SamplingParams(**greedy, prompt_logprobs=0, detokenize=False)
            # A request for its prompt's log-probabilities computes the whole prompt anew.
            cached = SamplingParams(**greedy, detokenize=False)
            found[name] = {
                "first": generate(llm, case["prompts"], whole),
                "again": generate(llm, case.get("again", []), cached),
                "class": ",".join(llm.apply_model(_class_name)) if case.get("ranks", 1) == 1 else "",
            }
        except Exception as error:
            found[name] = {"error": str(error)}
        finally:
            del llm
            cleanup_dist_env_and_memory()
    return found


def generate(llm: Any, rows: list[list[int]], sampling: Any) -> list[dict[str, Any]]:
    outputs = llm.generate([{"prompt_token_ids": row} for row in rows], sampling, use_tqdm=False) if rows else []
    found = []
    for row, output in zip(rows, outputs, strict=True):
        new = list(output.outputs[0].token_ids)
        of_prompt = zip(row[1:], (output.prompt_logprobs or [])[1:], strict=False)
        pairs = [*of_prompt, *zip(new, output.outputs[0].logprobs, strict=True)]
        logprobs = [choices[token].logprob for token, choices in pairs]
        found.append({"prompt": row, "new": new, "logprobs": logprobs, "cached": output.num_cached_tokens})
    return found


def _class_name(model: Any) -> str:
    return type(model).__name__


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(child(json.loads(Path(sys.argv[1]).read_text()))))
