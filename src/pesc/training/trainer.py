"""trl's SFTTrainer for crafted models: the router's losses per layer, and adapter folders as checkpoints."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, TrainerState
from trl import SFTTrainer

from pesc.crafting.adapter import load_adapter_weights, save_adapter
from pesc.crafting.surgery import crafted_ffns
from pesc.data.chat import IGNORED
from pesc.machine.allocator import release_where_scarce
from pesc.method.losses import token_mask
from pesc.method.routing import balance, expert_counts, record_router_logits
from pesc.training.loss import summed_loss
from pesc.training.sampler import LengthGroupedSampler


class PescTrainer(SFTTrainer):
    """Trains crafted models, and dense ones with LoRA, the same way.

    trl's own auxiliary loss merges the tokens of all layers into one; this one keeps eq. 10 per layer.
    """

    def __init__(self, model: PreTrainedModel, **kwargs: Any) -> None:
        super().__init__(model=model, **kwargs)
        self.aux_loss_enabled = False
        self.tokens_seen = 0
        if crafted_ffns(model):
            model.config.output_router_logits = False

    def is_finished_at(self, checkpoint: str) -> bool:
        """Whether a checkpoint is that of the last step."""
        state = TrainerState.load_from_json(os.path.join(checkpoint, "trainer_state.json"))
        return state.global_step >= state.max_steps

    def _get_train_sampler(self, train_dataset: Any = None) -> LengthGroupedSampler:
        lengths = [len(ids) for ids in (train_dataset or self.train_dataset)["input_ids"]]
        return LengthGroupedSampler(
            lengths, self.args.train_batch_size, self.args.seed, epoch=lambda: int(self.state.epoch or 0)
        )

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The trainer's, after which memory that is kept may not crowd out the machine."""
        loss = super().training_step(*args, **kwargs)
        release_where_scarce()
        return loss

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The language model's loss and, in training, the router's losses, averaged over micro-batches.

        `return_outputs` must be left out: no logits are kept.
        """
        assert not return_outputs
        with record_router_logits(model) as router_logits:
            loss = self._language_model_loss(model, inputs, num_items_in_batch)
        if not self.model.training:
            return loss
        if router_logits:
            aux_loss, weighted = self.model.router_loss(router_logits, inputs["attention_mask"])
            self._record_routing(aux_loss, weighted, router_logits, inputs["attention_mask"])
            # With num_items_in_batch the trainer adds micro-batches up instead of averaging them.
            steps = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
            loss = loss + weighted.to(loss.device) / steps
        self.tokens_seen += int(self.accelerator.gather(inputs["attention_mask"].sum()).sum())
        self._metrics["train"]["num_tokens"] = [self.tokens_seen]
        return loss

    def _language_model_loss(
        self, model: Any, inputs: dict[str, Any], num_items: torch.Tensor | int | None
    ) -> torch.Tensor:
        if self.args.device.type != "cpu":
            return super().compute_loss(model, inputs, num_items_in_batch=num_items)
        # trl's fused output layer saves the logits' memory on a GPU; on a CPU it takes half as long again.
        loss = summed_loss(model, inputs["input_ids"], inputs["attention_mask"], inputs["labels"]).sum()
        if num_items is None:
            return loss / (inputs["labels"][:, 1:] != IGNORED).sum().clamp(min=1)
        # num_items counts the tokens of all processes, over which gradients are averaged.
        return loss * self.accelerator.num_processes / num_items

    @torch.no_grad()
    def _record_routing(
        self,
        aux_loss: torch.Tensor,
        weighted: torch.Tensor,
        router_logits: list[torch.Tensor],
        attention_mask: torch.Tensor,
    ) -> None:
        mask = token_mask(attention_mask, router_logits[0].shape[0])
        counts = [
            expert_counts(logits, ffn.router.num_experts_per_tok, mask)
            for logits, (_, ffn) in zip(router_logits, crafted_ffns(self.model), strict=True)
        ]
        metrics = self._metrics["train"]
        metrics["aux_loss"].append(aux_loss.item())
        metrics["router_loss"].append(weighted.item())
        metrics["balance"].append(balance(counts))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Write the adapter folder: neither the base, nor anything pickled."""
        save_adapter(self.model, Path(output_dir or self.args.output_dir) / "adapter")

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """None for checkpoints: trl's would describe another kind of folder."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_adapter_weights(model or self.model, Path(os.fspath(resume_from_checkpoint)) / "adapter")
