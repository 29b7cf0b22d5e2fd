"""Tells a crafted model how a transformers trainer scales losses, so that the router's are scaled the same way."""

from __future__ import annotations

from typing import Any

from transformers.trainer_callback import TrainerCallback
from transformers.trainer_utils import has_length

from pesc.crafting.adapter import base_of
from pesc.crafting.backbone import set_router_loss_scale
from pesc.crafting.surgery import crafted_ffns


def register() -> None:
    """Give every transformers trainer a `RouterLossScale`."""
    from transformers.trainer import DEFAULT_CALLBACKS

    DEFAULT_CALLBACKS.append(RouterLossScale)


class RouterLossScale(TrainerCallback):
    """Makes the router's losses of an optimizer step the mean over its micro-batches; idle for other models.

    A model cannot see how many there are, and with `num_items_in_batch` a trainer adds them up instead of averaging.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuse arguments that the router's losses would not follow, and checkpoints that could not be written.

        Raises:
            ValueError: for trl's `router_aux_loss_coef`; for several GPUs in one process; for float16 without a
                `GradScaler`, as DeepSpeed scales losses itself; for checkpoints of an adapter whose base has no place.
        """
        model = kwargs["model"]
        if not crafted_ffns(model):
            return
        weight = getattr(args, "router_aux_loss_coef", None)
        if weight is not None:
            raise ValueError(
                f"router_aux_loss_coef ({weight}) must be left out of the trainer's arguments: set it in the model's "
                "PescConfig"
            )
        if args.n_gpu > 1:
            raise ValueError(
                f"{args.n_gpu} GPUs in one process would add up their router losses: start a process for each GPU "
                "(torchrun, accelerate launch)"
            )
        if args.fp16 and _scaler(kwargs["optimizer"]) is None:
            raise ValueError("fp16 must be off: what scales the gradients cannot be read here; use bf16")
        if args.save_strategy != "no" and getattr(model, "_hf_peft_config_loaded", False):
            base_of(model)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set the scale of each micro-batch of the step."""
        if crafted_ffns(kwargs["model"]):
            scaler = _scaler(kwargs["optimizer"])
            scale = 1.0 if scaler is None else scaler.get_scale()
            set_router_loss_scale(kwargs["model"], scale / micro_batches(args, state, kwargs["train_dataloader"]))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the model as it was before the step."""
        set_router_loss_scale(kwargs["model"], None)


def micro_batches(args: Any, state: Any, dataloader: Any) -> int:
    """How many micro-batches the optimizer step that begins has: the last step of an epoch may have fewer."""
    steps: int = args.gradient_accumulation_steps
    if not has_length(dataloader):
        return steps
    done = round(state.epoch % 1 * len(dataloader))
    return min(steps, len(dataloader) - done)


def _scaler(optimizer: Any) -> Any:
    return getattr(optimizer, "scaler", None)  # of accelerate's wrapper
