"""The contenders of the layer benchmark: our sparse layer and the dense limit. `libraries.py` has the others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moe_edu.config import MoEConfig
from moe_edu.moe.experts import Backend
from moe_edu.moe.layer import FeedForward, SparseMLP


@dataclass(frozen=True)
class LayerSize:
    """Sizes of one sparse layer: T tokens, E experts, D model width, F feed-forward width.

    `tight`: inference has only as many slots as training, instead of room for every token.
    """

    tokens: int
    experts: int
    d_model: int = 512
    ffn_dim: int = 2048
    tight: bool = False

    def config(self) -> MoEConfig:
        """No expert output masking: that of transformers differs, and the results are compared."""
        return MoEConfig(
            d_model=self.d_model,
            encoder_ffn_dim=self.ffn_dim,
            encoder_attention_heads=1,
            decoder_attention_heads=1,
            num_experts=self.experts,
            moe_token_dropout=0.0,
            moe_eval_capacity_token_fraction=-1.0 if self.tight else 1.0,
        )


@dataclass(frozen=True)
class Contender:
    """One way to compute the layer.

    Attributes:
        module: owns the parameters and the mode, training or eval.
        forward: `[1, T, D]` tokens -> `[1, T, D]` outputs.
        probes: the gradients of the last step to check: of the router's weight, then of w1, b1, w2, b2 of expert 0;
            None if the contender has no such parameter.
    """

    module: nn.Module
    forward: Callable[[Tensor], Tensor]
    probes: Callable[[], list[Tensor | None]]


def our_layer(layer: SparseMLP) -> Contender:
    experts = layer.experts

    def probes() -> list[Tensor | None]:
        stacked = [gradient_of(p)[0] for p in (experts.w1, experts.b1, experts.w2, experts.b2)]
        return [gradient_of(layer.router.classifier.weight), *stacked]

    return Contender(layer, lambda hidden: layer(hidden)[0], probes)


def with_backend(layer: SparseMLP, backend: Backend) -> SparseMLP:
    """The same layer with the same parameters and another back end."""
    with torch.device("meta"):
        other = SparseMLP(layer.config, layer.experts.w1.shape[1], backend)
    other.router, other.experts = layer.router, other.experts.train(layer.training)
    for name, parameter in layer.experts.named_parameters():
        setattr(other.experts, name, parameter)
    return other.train(layer.training)


def dense_layer(size: LayerSize) -> nn.Module:
    """A dense feed-forward network of one expert's size: given every kept row, it does the same work."""
    return FeedForward(size.config(), size.ffn_dim)


def gradient_of(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
