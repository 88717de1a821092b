"""One optimizer step: a model, its optimizer, and the processes that share the work."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

from moe_edu.data import Batch
from moe_edu.model.translator import MoETranslator
from moe_edu.moe.losses import MoELoss
from moe_edu.moe.metrics import ExpertMetrics, collect_metrics
from moe_edu.system.machine import peak_memory_mb, usable_cores
from moe_edu.training.settings import TrainingSettings
from moe_edu.training.shards import (
    CollectMetrics,
    add_gradients,
    autocast_dtype,
    bind_parameters,
    cut_shards,
    mean_load,
    mean_loss,
)
from moe_edu.training.workers import WorkerPool


class TrainingDivergedError(RuntimeError):
    """The loss or its gradient became NaN or infinite; an earlier saved state is still on disk."""


class StepResult(NamedTuple):
    """One optimizer step.

    Attributes:
        loss: the loss and its parts.
        expert_metrics: router statistics, one entry per sparse layer and shard.
        expert_load: share of the first choices that each expert received, `[E]`, by layer ("encoder.1").
        gradient_norm: norm of the gradient before clipping.
    """

    loss: MoELoss
    expert_metrics: tuple[ExpertMetrics, ...]
    expert_load: dict[str, Tensor]
    gradient_norm: Tensor


class Trainer:
    """A model and its optimizer, one step at a time.

    The model's parameters become views of one long tensor: it can have one trainer at a time, and must stay on its
    device.
    """

    def __init__(
        self,
        model: MoETranslator,
        settings: TrainingSettings,
        workers: WorkerPool | None = None,
        measure: CollectMetrics = collect_metrics,
    ) -> None:
        """`measure` computes the router losses; `workers`, if any, always use our own model and losses."""
        self.model = model
        self.settings = settings
        self.measure = measure
        self.device = model.shared.weight.device
        self.workers = workers
        self.steps_done = 0
        values = parameters_to_vector(model.parameters()).detach()
        self.weights = nn.Parameter(torch.empty_like(values) if workers is None else workers.weights)
        self.gradients = torch.empty_like(values) if workers is None else workers.gradients
        with torch.no_grad():
            self.weights.copy_(values)
        self.weights.grad = self.gradients
        bind_parameters(model, self.weights, self.gradients)
        self.optimizer = torch.optim.AdamW(
            [self.weights],
            lr=settings.learning_rate,
            betas=(0.9, 0.98),
            weight_decay=settings.weight_decay,
            fused=True,
        )
        dtype = autocast_dtype(settings.precision, self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=dtype == torch.float16)

    def step(self, batch: Batch, learning_rate: float) -> StepResult:
        """Forward, backward, clip, update.

        Raises:
            TrainingDivergedError: the loss or, without a loss scale, the gradient is not finite. The weights stay
                those from before the step.
        """
        if not self.model.training:
            self.model.train()
        shards = cut_shards(
            batch, resolve_shards(self.settings, self.device), self.settings.seed, self.steps_done
        )
        scale = self.scaler.scale(self.gradients.new_ones(()))
        if self.workers is not None:
            self.workers.start(shards[1:], scale.item())
        self.gradients.zero_()
        local = shards if self.workers is None else shards[:1]
        results = [add_gradients(self.model, shard, self.settings, scale, self.measure) for shard in local]
        if self.workers is not None:
            results += self.workers.finish(len(shards) - 1)
        loss = mean_loss(shards, results)

        self.scaler.unscale_(self.optimizer)
        norm = self.gradients.norm()
        self.gradients.mul_((self.settings.clip_norm / (norm + 1e-6)).clamp(max=1.0))
        # With a loss scale, an infinite gradient is routine: the scaler skips the step and lowers the scale.
        suspects = loss.total if self.scaler.is_enabled() else loss.total + norm
        if not torch.isfinite(suspects):
            raise TrainingDivergedError(
                f"the loss is {loss.total.item():.4g}, its gradient norm {norm.item():.4g}"
            )
        self.optimizer.param_groups[0]["lr"] = learning_rate
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.steps_done += 1
        metrics = tuple(layer for result in results for layer in result.expert_metrics)
        return StepResult(loss, metrics, mean_load(results), norm)

    def peak_memory_mb(self) -> float | None:
        """Peak memory of this process and the workers so far, in MB; None where the system does not report it."""
        own = peak_memory_mb()
        return None if own is None else own + (0.0 if self.workers is None else self.workers.peak_memory_mb())


def resolve_shards(settings: TrainingSettings, device: torch.device) -> int:
    """How many shards a batch is cut into: `settings.shards`, or the device's default if that is None."""
    if settings.shards is not None:
        return settings.shards
    return 2 if device.type == "cpu" else 1


def start_workers(
    model: MoETranslator, settings: TrainingSettings, processes: int | None
) -> AbstractContextManager[WorkerPool | None]:
    """One worker for each shard except the first; None if this process computes all shards."""
    device = model.shared.weight.device
    shards = resolve_shards(settings, device)
    if processes is None:
        processes = shards if device.type == "cpu" and shards <= usable_cores() else 1
    if processes not in (1, shards):
        raise ValueError(f"processes must be 1 or the number of shards, {shards}; got {processes}")
    if processes > 1 and device.type != "cpu":
        raise ValueError(f"several processes train on the CPU only; the device is {device}")
    return nullcontext() if processes == 1 else WorkerPool(shards - 1, model, settings)
