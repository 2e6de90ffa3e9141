"""Train a model of transformers by its `Trainer`, without backpropagation: a mixin that replaces the training step alone.

    python examples/hf_trainer.py

A small random Llama learns to count. It prints how many of the last numbers it gets right.
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import onward


class EstimatorTraining:
    """`class MyTrainer(EstimatorTraining, Trainer): pass`: gradients are the estimator's, all else is the Trainer's."""

    def __init__(self, estimator: onward.Estimator, **options: Any) -> None:
        super().__init__(model=estimator.model, **options)
        self.estimator = estimator
        self.model_accepts_loss_kwargs = True  # so that labels are counted over accumulated batches

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        self.optimizer = torch.optim.Adam(self.estimator.parameter_groups(), lr=self.args.learning_rate)
        return self.optimizer

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        model.train()
        batch = self._prepare_inputs(inputs)
        if num_items_in_batch is not None:
            batch = {**batch, "num_items_in_batch": num_items_in_batch}
        with self.compute_loss_context_manager():  # autocast, if it was asked for
            return self.estimator.estimate(batch).loss


def main() -> float:
    torch.manual_seed(0)
    sizes = {"vocab_size": 10, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, bos_token_id=0, eos_token_id=0, pad_token_id=None))
    data = [{"input_ids": (row := (torch.arange(8) + n) % 10), "labels": row} for n in range(480)]
    estimator = onward.FDFA(model, ["model.layers.0", "model.layers.1"])
    with tempfile.TemporaryDirectory() as folder:
        settings = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 2, "learning_rate": 1e-2}
        quiet = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "logging_strategy": "no", "use_cpu": True}
        arguments = TrainingArguments(folder, num_train_epochs=2, max_grad_norm=1.0, **settings, **quiet)
        kind = type("CountingTrainer", (EstimatorTraining, Trainer), {})
        kind(estimator, args=arguments, train_dataset=data).train()
    rows = torch.stack([example["input_ids"] for example in data[:10]])
    with torch.no_grad():
        return (model.eval()(rows).logits[:, -2].argmax(1) == rows[:, -1]).float().mean().item()


if __name__ == "__main__":
    print(f"{main():.0%} of the numbers are right")
