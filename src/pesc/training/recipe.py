"""A recipe: everything that decides a training run, in one dataclass that YAML and command line fill."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from cyclopts import App, CycloptsError, Parameter
from cyclopts.config import Yaml

from pesc.config import PescConfig


@dataclass(kw_only=True)
class LoraSettings:
    """LoRA on the dense weights (the paper: r 64, alpha 16, on q, k, v, o, gate, up, down)."""

    r: int = 64
    """Rank."""
    alpha: float = 16
    """Scaling numerator: LoRA adds alpha / r times its product."""
    dropout: float = 0.0
    """Dropout on LoRA's input."""
    target_modules: list[str] = field(default_factory=lambda: ["all-linear"])
    """Names of the linear layers that get LoRA; all-linear for all but the output layer."""


@dataclass(kw_only=True)
class Recipe:
    """One training run.

    Raises:
        ValueError: listing every setting that breaks its rule.
    """

    model: str
    """Dense base: a folder, a hub id, or smollm2-135m-instruct. A crafted folder is tuned further."""
    output: Path
    """Folder of the run: adapter, metrics, checkpoints."""
    train_data: Path
    """JSONL, a row a line: {"messages": [{"role": …, "content": …}, …]}. Every assistant turn is learnt."""
    method: PescConfig | None = field(default_factory=PescConfig)
    """The experts; null tunes the dense model with LoRA alone."""
    lora: LoraSettings | None = field(default_factory=LoraSettings)
    """LoRA; null trains routers and experts alone."""
    epochs: float = 1.0
    """Passes over the data; fractions allowed."""
    steps: int | None = None
    """Optimizer steps; overrides epochs."""
    batch_size: int = 4
    """Rows in one forward pass."""
    gradient_accumulation_steps: int = 1
    """Forward passes in one optimizer step."""
    max_length: int = 2048
    """Tokens of a row; what is longer is cut, and counted."""
    learning_rate: float = 2e-4
    """Peak rate of AdamW, held constant after the warm-up (the paper's 2e-4)."""
    warmup_ratio: float = 0.03
    """Share of the steps that warm up."""
    max_grad_norm: float = 0.3
    """Gradient clipping."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of weights and arithmetic. LoRA itself always trains in float32."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    save_steps: int = 500
    """Steps between checkpoints; an interrupted run resumes from the last."""
    seed: int = 0
    """Of initial values, order of the data, and dropout."""

    def __post_init__(self) -> None:
        self.output, self.train_data = self.output.expanduser(), self.train_data.expanduser()
        rules = {
            "epochs": (self.epochs > 0, "above 0"),
            "steps": (self.steps is None or self.steps >= 1, "at least 1"),
            "batch_size": (self.batch_size >= 1, "at least 1"),
            "gradient_accumulation_steps": (self.gradient_accumulation_steps >= 1, "at least 1"),
            "max_length": (self.max_length >= 2, "at least 2"),
            "learning_rate": (self.learning_rate > 0, "above 0"),
            "warmup_ratio": (0 <= self.warmup_ratio < 1, "at least 0 and below 1"),
            "max_grad_norm": (self.max_grad_norm > 0, "above 0"),
            "save_steps": (self.save_steps >= 1, "at least 1"),
            "seed": (self.seed >= 0, "at least 0"),
        }
        problems = [f"{name} ({getattr(self, name)}) must be {rule}" for name, (ok, rule) in rules.items() if not ok]
        if self.lora is not None:
            lora = self.lora
            problems += [f"lora.r ({lora.r}) must be at least 1"] * (lora.r < 1)
            problems += [f"lora.alpha ({lora.alpha}) must be above 0"] * (not lora.alpha > 0)
            problems += [f"lora.dropout ({lora.dropout}) must be at least 0 and below 1"] * (not 0 <= lora.dropout < 1)
        if self.lora is None and self.method is None:
            problems.append("method and lora are both null: nothing would train")
        if problems:
            raise ValueError("recipe: " + "; ".join(problems))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as YAML holds them."""
        values = dataclasses.asdict(self)
        return values | {"output": str(self.output), "train_data": str(self.train_data)}

    def save(self, path: Path) -> None:
        """Write the recipe as YAML."""
        path.write_text(yaml.safe_dump(self.to_dict(), sort_keys=False))


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and change some of its settings.

    Args:
        path: a YAML file.
        overrides: `key=value`, nested keys with dots: `lora.r=8`, `method=null`.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: for a key that is no setting (the nearest one is named), a value of the wrong type or range, or
            a file that is no YAML.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such recipe")
    broken = [item for item in overrides if "=" not in item or item.startswith("-")]
    if broken:
        raise ValueError(f"{', '.join(broken)}: a change to the recipe is written key=value, such as lora.r=8")
    reader = App(
        name="recipe",
        config=Yaml(path, must_exist=True),
        default_parameter=Parameter(name_transform=lambda name: name),
        result_action="return_value",
        help_flags=[],
        version_flags=[],
    )

    @reader.default
    def build(recipe: Annotated[Recipe, Parameter(name="*")]) -> Recipe:
        return recipe

    try:
        return reader([f"--{item}" for item in overrides], exit_on_error=False, print_error=False)
    except CycloptsError as error:
        message = " ".join(str(error).split()).replace("--", "")
        raise ValueError(f"{path}: {message}") from error
