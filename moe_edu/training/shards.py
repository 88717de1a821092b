"""The loss of a batch and its gradients, shard by shard: the same work in every process of a training run.

A batch is cut into shards, and its gradient is the mean of theirs, weighted by target tokens. Each shard is routed on
its own, like each group in GShard (Lepikhin et al. 2020, section 2.2): it has its own expert capacity and balancing
loss. The result does not depend on which process computes a shard.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import vector_to_parameters

from moe_edu.config import MoEConfig
from moe_edu.data import Batch
from moe_edu.model.translator import MoETranslator, TranslatorOutput
from moe_edu.moe.losses import MoELoss, SpecialLossNormalizingFactor, moe_loss
from moe_edu.moe.metrics import ExpertMetrics, collect_metrics
from moe_edu.moe.routing import RouterOutput, count_per_expert
from moe_edu.training.settings import Precision, TrainingSettings

CollectMetrics = Callable[[Iterable[RouterOutput | None]], tuple[ExpertMetrics, ...]]


class Shard(NamedTuple):
    """A part of a batch, its share of the batch's target tokens, and the seed of its dropout and sampling."""

    batch: Batch
    weight: float
    seed: int


class ScaledShard(NamedTuple):
    """A shard to differentiate, and the factor for its gradients, of which fp16 would round small ones to zero."""

    shard: Shard
    loss_scale: float


class ShardResult(NamedTuple):
    """What one shard returns in addition to its gradients.

    Attributes:
        loss: the loss and its parts.
        expert_metrics: router statistics, one entry per sparse layer that ran.
        expert_load: share of the first choices that each expert received, `[E]`, by layer ("encoder.1").
    """

    loss: MoELoss
    expert_metrics: tuple[ExpertMetrics, ...]
    expert_load: dict[str, Tensor]


def cut_shards(batch: Batch, parts: int, seed: int, step: int) -> list[Shard]:
    """Cut `batch` into `parts` shards for the optimizer step `step`; a batch of fewer pairs gives fewer shards."""
    shards = batch.split(parts)
    tokens = [int(shard.decoder_mask.sum()) for shard in shards]
    seeds = [np.random.SeedSequence((seed, step, i)).generate_state(1)[0] for i in range(len(shards))]
    return [
        Shard(shard, count / sum(tokens), int(shard_seed))
        for shard, count, shard_seed in zip(shards, tokens, seeds, strict=True)
    ]


def add_gradients(
    model: MoETranslator,
    shard: Shard,
    settings: TrainingSettings,
    loss_scale: Tensor | float = 1.0,
    measure: CollectMetrics = collect_metrics,
) -> ShardResult:
    """Add the shard's weighted gradients, times `loss_scale`, to those of the parameters, with the shard's own seed."""
    device = model.shared.weight.device
    dtype = autocast_dtype(settings.precision, device)
    with seeded(shard.seed, device):
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            batch = shard.batch.to(device)
            output = model(batch.source_ids, batch.source_mask, batch.decoder_input_ids, batch.decoder_mask)
            loss, metrics = compute_loss(output, batch, settings, model.config, measure)
        (loss.total * (loss_scale * shard.weight)).backward()
    detached = MoELoss(*(part.detach() for part in loss))
    return ShardResult(detached, metrics, expert_load(output))


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Inside, random numbers depend on `seed` alone, on the CPU and on `device`; afterwards all states are restored."""
    cuda = device.type == "cuda"
    with (
        torch.random.fork_rng(devices=[device] if cuda else []),
        torch.cuda.device(device) if cuda else nullcontext(),  # which torch.cuda.manual_seed seeds
    ):
        # torch.manual_seed would record the call's traceback for every kind of device, which takes milliseconds.
        torch.default_generator.manual_seed(seed)
        if cuda:
            torch.cuda.manual_seed(seed)
        yield


def mean_loss(shards: Sequence[Shard], results: Sequence[ShardResult]) -> MoELoss:
    """The loss of the whole batch: the weighted mean of the shards' losses, and the sum of their `weight_sum`."""
    columns = zip(*(result.loss for result in results), strict=True)
    weights = [shard.weight for shard in shards]
    mean = MoELoss(*(sum_weighted(column, weights) for column in columns))
    return mean._replace(
        weight_sum=sum_weighted([result.loss.weight_sum for result in results], [1.0] * len(shards))
    )


def sum_weighted(values: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    return torch.stack([value * weight for value, weight in zip(values, weights, strict=True)]).sum(0)


def mean_load(results: Sequence[ShardResult]) -> dict[str, Tensor]:
    """Each layer's load, averaged over the shards in which it ran."""
    layers = dict.fromkeys(layer for result in results for layer in result.expert_load)
    return {
        layer: torch.stack([r.expert_load[layer] for r in results if layer in r.expert_load]).mean(0)
        for layer in layers
    }


def compute_loss(
    output: TranslatorOutput,
    batch: Batch,
    settings: TrainingSettings,
    config: MoEConfig,
    measure: CollectMetrics = collect_metrics,
) -> tuple[MoELoss, tuple[ExpertMetrics, ...]]:
    """The loss of one batch per real target token, and the metrics of its routers as `measure` computes them."""
    metrics = measure(output.routing)
    loss = moe_loss(
        output.logits,
        batch.labels,
        batch.decoder_mask,
        expert_metrics=metrics,
        # If no layer routed (a dense model, or LayerDrop skipped every sparse layer), there is nothing to balance.
        router_aux_loss_coef=config.router_aux_loss_coef if metrics else 0.0,
        router_z_loss_coef=config.router_z_loss_coef if metrics else 0.0,
        label_smoothing=settings.label_smoothing,
        z_loss=settings.z_loss,
        loss_normalizing_factor=SpecialLossNormalizingFactor.NUM_REAL_TARGET_TOKENS,
    )
    return loss, metrics


def expert_load(output: TranslatorOutput) -> dict[str, Tensor]:
    """Share of the first choices that each expert received, `[E]`, by sparse layer ("encoder.1")."""
    shares = {}
    for side, routing in (("encoder", output.encoder.routing), ("decoder", output.decoder.routing)):
        for i, layer in enumerate(routing):
            if layer is not None:
                counts = count_per_expert(layer.expert_index[:, 0], layer.num_experts)
                shares[f"{side}.{i}"] = counts / counts.sum().clamp(min=1)
    return shares


def bind_parameters(model: nn.Module, weights: Tensor, gradients: Tensor) -> None:
    """Make every parameter a view of `weights` and its gradient a view of `gradients`, in `model.parameters()` order.

    With one long tensor instead of many short ones, the optimizer, the clipping and the exchange between processes take
    one operation each.
    """
    vector_to_parameters(weights, model.parameters())
    start = 0
    for parameter in model.parameters():
        end = start + parameter.numel()
        parameter.grad = gradients[start:end].view_as(parameter)
        start = end


def autocast_dtype(precision: Precision, device: torch.device) -> torch.dtype | None:
    """The dtype that autocast uses; None for plain fp32."""
    if precision == "auto":
        if device.type != "cuda":
            return None
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
