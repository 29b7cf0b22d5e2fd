"""The command `pesc`: one function a verb, each a thin cover of the library. --help loads nothing heavy."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import App, CycloptsError, Parameter

import pesc
from pesc.bench.config import BenchConfig
from pesc.config import PescConfig

if TYPE_CHECKING:
    from rich.console import Console

_Model = Annotated[
    str, Parameter(help="A run, an adapter, a crafted or dense folder, a hub id, or smollm2-135m-instruct.")
]
_Json = Annotated[bool, Parameter(name="--json", help="Print JSON.")]
_Base = Annotated[
    str | None, Parameter(help="An adapter's base, if it moved: a folder or a hub id. Its weights must be the same.")
]

app = App(
    name="pesc",
    help="Turn a dense language model into a Mixture of Experts while instruction-tuning it.",
    version=pesc.__version__,
    help_format="markdown",
    suppress_keyboard_interrupt=False,
    default_parameter=Parameter(consume_multiple=True, negative=""),
)


@app.command
def demo(*, output: Path = Path("runs/demo"), seeds: tuple[int, ...] = (0,)) -> None:
    """Run the complete job on the embedded model: craft, tune on chat, code and math, compare, report.

    Some 10 minutes a seed on two cores. The same command resumes an interrupted demo.

    Example: `pesc demo --output runs/demo --seeds 0 1 2`

    Parameters
    ----------
    output
        Folder of the run.
    seeds
        Seeds of the initial values and of the order of the data. One seed gives no verdict.
    """
    from pesc.demo.demo import run_demo

    run_demo(output, _console(), list(seeds))


@app.command
def craft(
    model: str,
    out: Path,
    *,
    config: Annotated[PescConfig | None, Parameter(name="*")] = None,
) -> None:
    """Give a dense checkpoint routers and experts, on disk, without loading its weights.

    The crafted folder computes exactly what the dense model computes, until it is tuned.

    Example: `pesc craft meta-llama/Llama-2-7b-hf crafted --num-experts 8 --adapter-dim 512`

    Parameters
    ----------
    model
        Dense model: a folder, a hub id, or smollm2-135m-instruct.
    out
        Folder to write. It must not exist yet.
    """
    from pesc.crafting.craft_checkpoint import craft_checkpoint
    from pesc.crafting.info import describe
    from pesc.crafting.show import show_info

    show_info(describe(craft_checkpoint(model, out, config or PescConfig())), _console())


@app.command
def train(recipe: Path, *changes: Annotated[str, Parameter(allow_leading_hyphen=False)], quiet: bool = False) -> None:
    """Tune a model by a recipe. The same command resumes an interrupted run from its last checkpoint.

    Example: `pesc train recipes/demo.yaml lora.r=8 pesc.num_experts=4 output.folder=runs/small`

    Parameters
    ----------
    recipe
        YAML file. The folder recipes/ holds commented ones.
    changes
        Changes to the recipe, written section.key=value. pesc=null trains the dense model.
    quiet
        Print errors and the last lines alone.
    """
    from rich.console import Console

    from pesc.training.recipe import load_recipe
    from pesc.training.train import train as run

    folder = run(load_recipe(recipe, changes), Console(quiet=quiet)).parent
    lines = f"Next:   pesc chat {folder}\n        pesc info {folder}"
    _console().print(lines, highlight=False, markup=False, soft_wrap=True)


@app.command
def data(
    recipe: Path, *changes: Annotated[str, Parameter(allow_leading_hyphen=False)], html: Path | None = None
) -> None:
    """Show what a recipe trains on: sources, lengths, what is left out, and the tokens that are trained on.

    What it prepares, `pesc train` finds prepared.

    Example: `pesc data recipes/demo.yaml data.packing=true --html data.html`

    Parameters
    ----------
    recipe
        YAML file. The folder recipes/ holds commented ones.
    changes
        Changes to the recipe, written section.key=value.
    html
        Page to write, with what the terminal shows.
    """
    from rich.console import Console

    from pesc.data.show import show_mixture
    from pesc.training.recipe import load_recipe
    from pesc.training.train import prepare_data

    console = Console(record=True)
    mixture, tokenizer = prepare_data(load_recipe(recipe, changes), console)
    show_mixture(mixture, tokenizer, console)
    if html:
        console.save_html(str(html))


@app.command
def info(model: _Model, *, base: _Base = None, as_json: _Json = False) -> None:
    """Say what a model is: family, experts, parameters, sizes, missing or untouched experts.

    Example: `pesc info runs/demo --json`
    """
    from pesc.crafting.info import describe
    from pesc.crafting.show import show_info

    described = describe(model, base=base)
    if as_json:
        print(json.dumps(described.to_dict(), indent=2))
    else:
        show_info(described, _console())


@app.command
def chat(
    model: _Model,
    *,
    base: _Base = None,
    max_new_tokens: int = 512,
    temperature: float = 0.2,
    system: str | None = None,
) -> None:
    """Talk to a model in the terminal. Ctrl-C stops an answer, Ctrl-D leaves.

    Example: `pesc chat runs/demo --temperature 0`

    Parameters
    ----------
    max_new_tokens
        Longest answer, in tokens.
    temperature
        Temperature of sampling. 0 always takes the likeliest token.
    system
        System message. It replaces the chat template's own.
    """
    from pesc.serving.chat import converse, open_chat

    settings = {"max_new_tokens": max_new_tokens, "temperature": temperature, "system": system}
    converse(open_chat(model, _console(), base=base, **settings))


@app.command(name="import")
def import_(checkpoint: str, out: Path) -> None:
    """Turn a published checkpoint (Camelidae, Qwen2idae, Sparsetral) into a crafted folder.

    Example: `pesc import hywu/Camelidae-8x7B camelidae`

    Parameters
    ----------
    checkpoint
        Folder or hub id, with safetensors or .bin files. The layout is recognised by tensor names and config.
    out
        Folder to write. It must not exist yet.
    """
    from pesc.crafting.info import describe
    from pesc.crafting.show import show_info
    from pesc.interop.formats import import_checkpoint

    show_info(describe(import_checkpoint(checkpoint, out)), _console())


@app.command
def export(model: str, out: Path, *, format: str = "pesc", base: _Base = None) -> None:
    """Write a tuned model in a format that other programs load.

    Example: `pesc export runs/demo standalone --format pesc`

    Parameters
    ----------
    model
        A run, an adapter or a crafted folder.
    out
        Folder to write, or a .gguf file. It must not exist yet.
    format
        pesc: a folder with LoRA folded in and a model card. adapter: the small folder alone. stock: an architecture
        of transformers and vLLM that suits the base (by name: granitemoeshared, qwen2_moe, qwen3_next). gguf-f32,
        gguf-f16, gguf-q8_0: a file for llama.cpp. camelidae, sparsetral: the published layouts. stock and gguf need
        parallel + swiglu experts. The published layouts need the paper's sequential + gelu.
    """
    from pesc.interop.formats import export as write
    from pesc.machine.quiet import quiet_libraries

    with quiet_libraries():
        written = write(model, out, format, base=base)
    _console().print(f"wrote {written}", highlight=False, markup=False)


@app.command
def verify(path: str, *, base: _Base = None, as_json: _Json = False) -> int:
    """Check that a model's files hold the experts that they promise. The exit code is 1 if they do not.

    Example: `pesc verify camelidae-8x7b.Q4_K_M.gguf`

    Parameters
    ----------
    path
        A crafted folder, an adapter, a run, a published layout, a stock architecture, or a GGUF file.
    """
    from pesc.interop.verify.show import show_report
    from pesc.interop.verify.verify import verify as check

    report = check(path, base=base)
    if as_json:
        print(json.dumps(report.to_dict(), indent=2))
    else:
        show_report(report, _console())
    return 0 if report.complete else 1


@app.command
def serve(
    model: _Model,
    *,
    base: _Base = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    engine: Literal["auto", "vllm", "transformers"] = "auto",
) -> None:
    """Serve a model behind OpenAI's API until Ctrl-C, by vLLM if it is installed, else by transformers.

    If PESC_API_KEY is set in the environment, clients must send it.

    Example: `pesc serve runs/demo --port 8000`

    Parameters
    ----------
    host
        Address to bind. Only this machine can reach the default.
    port
        Port to bind. 0 takes any free one.
    engine
        "auto" means vLLM if it is installed, else transformers.
    """
    from pesc.serving.server import serve as run

    run(model, base=base, host=host, port=port, engine=engine)


@app.command
def bench(
    *,
    config: Annotated[BenchConfig | None, Parameter(name="*")] = None,
    output: Path | None = None,
    as_json: _Json = False,
) -> None:
    """Time a crafted model beside its dense one and beside other ways to compute the same, in one run.

    Example: `pesc bench --workloads train prefill decode --dtype bfloat16 --pesc.adapter-dim 512`

    Parameters
    ----------
    config
        What to time.
    output
        JSON file to write.
    """
    from rich.console import Console

    from pesc.bench.measure import run_bench

    results = run_bench(config or BenchConfig(), Console(quiet=as_json), output)
    if as_json:
        print(json.dumps(results, indent=2))


def main(arguments: list[str] | None = None) -> int:
    """Run the command.

    Returns:
        Exit code: 0 for success; 1 for wrong input; 2 for a wrong command line; 130 after Ctrl-C, 143 after SIGTERM.
    """
    # Its import prints a notice about optional kernels, above every command's output.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        result = app(arguments, exit_on_error=False, result_action="return_value")
    except CycloptsError:
        return 2
    except KeyboardInterrupt as stop:
        print(str(stop) or "\ninterrupted", file=sys.stderr)
        return getattr(stop, "exit_code", 130)
    except (ValueError, OSError) as error:
        print(f"pesc: {error}", file=sys.stderr)
        return 1
    return result if isinstance(result, int) else 0


def _console() -> Console:
    from rich.console import Console

    return Console()
