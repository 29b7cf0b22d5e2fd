"""A recipe: everything that decides a training run, in sections that a YAML file and the command line fill."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml

from pesc.config import PescConfig
from pesc.crafting.embedded import EMBEDDED
from pesc.data.settings import DataSettings
from pesc.interop.places import is_hub_id
from pesc.rules import Rule, Settings, above, at_least, below
from pesc.storage.files import write_text

Scheduler = Literal[
    "constant_with_warmup", "constant", "linear", "cosine", "cosine_with_restarts", "polynomial", "inverse_sqrt"
]
"""transformers' names; those that need no settings of their own."""
Optimizer = Literal[
    "adamw_torch",
    "adamw_torch_fused",
    "adamw_8bit",
    "paged_adamw_32bit",
    "paged_adamw_8bit",
    "lion_32bit",
    "lion_8bit",
    "paged_lion_32bit",
    "paged_lion_8bit",
    "adafactor",
    "rmsprop",
    "sgd",
]
"""transformers' names; those that need no package but bitsandbytes, and no settings of their own."""
DPO_BETA = 0.1
"""As in DPO's paper."""

Reporter = Literal[
    "azure_ml",
    "clearml",
    "codecarbon",
    "comet_ml",
    "dagshub",
    "dvclive",
    "kubeflow",
    "mlflow",
    "neptune",
    "swanlab",
    "tensorboard",
    "trackio",
    "wandb",
]
"""transformers' names."""


@dataclass(frozen=True, kw_only=True)
class ModelSettings(Settings):
    """The model that is tuned."""

    name: str
    """A dense base: a folder, a hub id, or smollm2-135m-instruct. A crafted folder is tuned further."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the base's weights, and of arithmetic."""
    quantization: Literal["nf4", "int8"] | None = None
    """Of the base's linear layers while tuning, by bitsandbytes: nf4 with double quantization (the paper), or int8."""


@dataclass(frozen=True, kw_only=True)
class LoraSettings(Settings):
    """LoRA on the dense weights (the paper: r 64, alpha 16, on q, k, v, o, gate, up, down)."""

    r: Annotated[int, at_least(1)] = 64
    """Rank."""
    alpha: Annotated[float, above(0)] = 16
    """Scaling numerator: LoRA adds alpha / r times its product."""
    dropout: Annotated[float, at_least(0), below(1)] = 0.0
    """Dropout on LoRA's input."""
    target_modules: list[str] = field(default_factory=lambda: ["all-linear"])
    """Names of the linear layers that get LoRA; all-linear means all but the output layer."""


@dataclass(frozen=True, kw_only=True)
class TrainingSettings(Settings):
    """Optimization, without weight decay."""

    objective: Literal["sft", "dpo"] = "sft"
    """sft: to say what the assistant says. dpo: to prefer the chosen answers of preference pairs to the rejected."""
    dpo_beta: Annotated[float | None, above(0)] = None
    """How strongly dpo keeps the model near its start; null means 0.1."""
    epochs: Annotated[float, above(0)] = 1.0
    """Passes over the data; fractions allowed."""
    steps: Annotated[int | None, at_least(1)] = None
    """Optimizer steps; overrides epochs."""
    batch_size: Annotated[int, at_least(1)] = 4
    """Examples in one forward pass."""
    gradient_accumulation_steps: Annotated[int, at_least(1)] = 1
    """Forward passes in one optimizer step."""
    learning_rate: Annotated[float, above(0)] = 2e-4
    """Peak rate (the paper: 2e-4)."""
    router_learning_rate: Annotated[float | None, above(0)] = None
    """Peak rate of the routers, if it is another."""
    experts_learning_rate: Annotated[float | None, above(0)] = None
    """Peak rate of the experts, if it is another."""
    optim: Optimizer = "adamw_torch_fused"
    """The optimizer (the paper: paged_adamw_32bit); all but torch's and Adafactor need bitsandbytes."""
    trained_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of LoRA, routers and experts and the optimizer's moments. In bfloat16 small steps are lost."""
    lr_scheduler_type: Scheduler = "constant_with_warmup"
    """How the rate goes on after the warm-up (the paper: constant)."""
    warmup_ratio: Annotated[float, at_least(0), below(1)] = 0.03
    """Share of the steps that warm up."""
    max_grad_norm: Annotated[float, above(0)] = 0.3
    """Gradient clipping."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    eval_steps: Annotated[int | None, at_least(1)] = None
    """Steps between evaluations on data.eval. The adapter becomes that of the evaluation with the lowest loss."""
    early_stopping_patience: Annotated[int | None, at_least(1)] = None
    """Evaluations without a lower loss after which training ends; null means that it goes on."""
    seed: Annotated[int, at_least(0), below(2**32)] = 0
    """Of initial values, order of the data, and dropout."""

    @staticmethod
    def conflicts(values: dict[str, Any]) -> Iterator[str]:
        if values.get("early_stopping_patience") is not None and values.get("eval_steps", ...) is None:
            yield "early_stopping_patience needs eval_steps, and data.eval to evaluate on"
        if values.get("dpo_beta") is not None and values.get("objective") == "sft":
            yield f"dpo_beta ({values['dpo_beta']}) needs objective dpo"


@dataclass(frozen=True, kw_only=True)
class OutputSettings(Settings):
    """Where the run is kept."""

    folder: Path
    """Folder of the run: adapter, metrics, checkpoints."""
    save_steps: Annotated[int, at_least(1)] = 500
    """Steps between checkpoints; an interrupted run resumes from the last."""
    report_to: list[Reporter] | None = None
    """Programs to log to besides metrics.jsonl. TensorBoard's files go into the folder's logs/."""
    push_to_hub: Annotated[str | None, Rule("such as org/name", is_hub_id)] = None
    """Hub id to upload the adapter to, with a model card, once it is complete. A new repository is private."""


@dataclass(frozen=True, kw_only=True)
class Recipe(Settings):
    """One training run.

    Raises:
        ValueError: when pesc and lora are both None, so that nothing would train; when the run has its base's name; for
            a quantized base without LoRA; for trained weights that are narrower than the base's; for data that DPO
            cannot use.
    """

    model: ModelSettings
    pesc: PescConfig | None = field(default_factory=PescConfig)
    """The experts; None tunes the dense model with LoRA alone."""
    lora: LoraSettings | None = field(default_factory=LoraSettings)
    """LoRA; None trains routers and experts alone."""
    data: DataSettings
    training: TrainingSettings = field(default_factory=TrainingSettings)
    output: OutputSettings

    def __post_init__(self) -> None:
        super().__post_init__()
        name, folder = self.model.name, self.output.folder
        if name != EMBEDDED and Path(name).expanduser() == folder and not (folder / "config.json").is_file():
            raise ValueError(f"output.folder ({folder}) must not be model.name: the run would hide that model")
        if self.model.quantization and self.lora is None:
            raise ValueError(
                f"model.quantization ({self.model.quantization}) needs lora: transformers' Trainer tunes no quantized "
                "model without it"
            )
        if self.training.trained_dtype == "bfloat16" != self.model.dtype:
            raise ValueError("training.trained_dtype (bfloat16) must be float32, as model.dtype is")
        if self.training.objective == "dpo":
            for source in [*self.data.sources, *self.data.held_out]:
                if source.format not in (None, "preference"):
                    raise ValueError(f"format ({source.format}) must be preference with training.objective dpo")
            if self.data.packing:
                raise ValueError("data.packing (true) must be false with training.objective dpo")

    @staticmethod
    def conflicts(values: dict[str, Any]) -> Iterator[str]:
        if values.get("pesc", ...) is values.get("lora", ...) is None:
            yield "pesc and lora are both null, so nothing would train"
        data, training = (_values(values.get(section)) for section in ("data", "training"))
        if data.get("eval") is not None and training.get("eval_steps") is None:
            yield "data.eval needs training.eval_steps: how often to evaluate"
        if data.get("eval") is None and training.get("eval_steps") is not None:
            yield f"training.eval_steps ({training['eval_steps']}) needs data.eval: what to evaluate on"

    def save(self, path: Path) -> None:
        """Write the recipe as YAML."""
        write_text(path, yaml.safe_dump(self.to_dict(), sort_keys=False))


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and change some of its settings.

    Args:
        path: a YAML file.
        overrides: `key=value`, with dotted keys and values as in YAML: `lora.r=8`, `pesc=null`.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: for a file that is no YAML, or listing every key that is no setting, with the nearest one, and
            every value of the wrong type or range.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such recipe")
    broken = [item for item in overrides if not re.match(r"[a-z]\w*(\.\w+)*=", item)]
    if broken:
        raise ValueError(f"{', '.join(broken)}: a change to the recipe is written key=value, such as lora.r=8")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
        for item in overrides:
            key, _, text = item.partition("=")
            values = _changed(values, key.split("."), yaml.load(text, _Loader))
        return Recipe.from_dict(values)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} must be YAML: {' '.join(str(error).split())}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _values(section: Any) -> dict[str, Any]:
    return section if isinstance(section, dict) else vars(section) if section else {}


class _Loader(yaml.SafeLoader):
    """Reads 1e-3 as a number, as YAML 1.2 does, and 2026-11-24 as text."""

    yaml_implicit_resolvers: ClassVar = {  # type: ignore[misc]
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith("timestamp")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_FLOAT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, [*"-+0123456789"])


def _changed(values: Any, keys: list[str], value: Any) -> Any:
    """`values` with the value at a path of keys replaced; sections that are missing or null are made."""
    if not keys:
        return value
    section = values if isinstance(values, dict) else {}
    return section | {keys[0]: _changed(section.get(keys[0]), keys[1:], value)}


def differences(recipe: Recipe, other: Recipe) -> list[str]:
    """What makes two runs' results differ: "key: the other's value there, the recipe's asked for".

    Not counted: where a run is kept and how often it is saved, how a path is written, whether activations are
    recomputed, and the data's paths (their content counts, but is not in the recipe).
    """
    return list(_differences(_what_counts(recipe), _what_counts(other), ""))


def _what_counts(recipe: Recipe) -> dict[str, Any]:
    values = recipe.to_dict()
    del values["output"], values["training"]["gradient_checkpointing"]
    data = recipe.data
    for name, sources in (("train", data.sources), ("eval", data.held_out)):
        values["data"][name] = [source.to_dict() | {"path": ""} for source in sources]
    if (folder := Path(recipe.model.name).expanduser()).exists():
        values["model"]["name"] = str(folder.resolve())
    return values


def _differences(wanted: Any, there: Any, key: str) -> Iterator[str]:
    if isinstance(wanted, dict) and isinstance(there, dict):
        for name in wanted:
            yield from _differences(wanted[name], there[name], f"{key}.{name}".lstrip("."))
    elif wanted != there:
        yield f"{key}: {there} there, {wanted} asked for"
