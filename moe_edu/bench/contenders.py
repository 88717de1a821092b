"""What the layer benchmark compares: our sparse layer, the reference's with the same weights, and the dense limit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moe_edu.config import MoEConfig
from moe_edu.layers import FeedForward, SparseMLP


@dataclass(frozen=True)
class LayerSize:
    """Sizes of one sparse layer: T tokens, E experts, D model width, F feed-forward width."""

    tokens: int
    experts: int
    d_model: int = 512
    ffn_dim: int = 2048

    def config(self) -> MoEConfig:
        """No expert output masking: the reference's own is another one, and the results are compared."""
        return MoEConfig(
            d_model=self.d_model,
            encoder_ffn_dim=self.ffn_dim,
            encoder_attention_heads=1,
            decoder_attention_heads=1,
            num_experts=self.experts,
            moe_token_dropout=0.0,
        )


@dataclass(frozen=True)
class Contender:
    """One way to compute the layer.

    Attributes:
        module: owns the parameters, and knows training from eval.
        forward: `[1, T, D]` tokens to `[1, T, D]` outputs.
        probes: the parameters whose gradients are checked: the router's weight, then w1, b1, w2, b2 of expert 0.
            Each call reads the gradients of the last step.
    """

    module: nn.Module
    forward: Callable[[Tensor], Tensor]
    probes: Callable[[], list[Tensor]]


def our_layer(layer: SparseMLP) -> Contender:
    experts = layer.experts

    def probes() -> list[Tensor]:
        stacked = [gradient_of(p)[0] for p in (experts.w1, experts.b1, experts.w2, experts.b2)]
        return [gradient_of(layer.router.classifier.weight), *stacked]

    return Contender(layer, lambda hidden: layer(hidden)[0], probes)


def reference_layer(layer: SparseMLP) -> Contender:
    """`NllbMoeSparseMLP` of transformers 4.x with the weights and the mode of `layer`.

    Raises:
        ImportError: transformers is not installed, or is a release whose layer runs two experts only.
    """
    hf_config, sparse_mlp = _import_reference()
    config = layer.config
    E, F, D = layer.experts.w1.shape
    fields = {
        "d_model": D,
        "encoder_ffn_dim": F,
        "num_experts": E,
        "moe_token_dropout": config.moe_token_dropout,
        "activation_dropout": config.activation_dropout,
        "activation_function": config.activation_function,
        "moe_eval_capacity_token_fraction": config.moe_eval_capacity_token_fraction,
    }
    module = sparse_mlp(hf_config(**fields), F)
    module.router.classifier.weight = nn.Parameter(layer.router.classifier.weight.detach().clone())
    for e in range(E):
        expert = module.experts[f"expert_{e}"]
        # Views, so that the comparison holds the weights once.
        expert.fc1.weight = nn.Parameter(layer.experts.w1.detach()[e])
        expert.fc1.bias = nn.Parameter(layer.experts.b1.detach()[e])
        expert.fc2.weight = nn.Parameter(layer.experts.w2.detach()[e])
        expert.fc2.bias = nn.Parameter(layer.experts.b2.detach()[e])

    def forward(hidden: Tensor) -> Tensor:
        # The module remembers its last capacity and would use it again; None means 2 * ceil(T / E).
        module.router.expert_capacity = None
        return module(hidden, None)[0]

    def probes() -> list[Tensor]:
        first = module.experts["expert_0"]
        parameters = (first.fc1.weight, first.fc1.bias, first.fc2.weight, first.fc2.bias)
        return [gradient_of(p) for p in (module.router.classifier.weight, *parameters)]

    return Contender(module.train(layer.training), forward, probes)


def dense_layer(size: LayerSize, dtype: torch.dtype) -> nn.Module:
    """The dense feed-forward network of one expert's size: fed every kept row, it does the same work."""
    return FeedForward(size.config(), size.ffn_dim).to(dtype)


def gradient_of(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def reference_is_here() -> str | None:
    """None if the reference can be imported, else what to do about it."""
    try:
        _import_reference()
    except ImportError as error:
        return str(error)
    return None


def _import_reference() -> tuple[Any, Any]:
    mend = "run `pip install transformers==4.57.6` to compare with the reference"
    try:
        import transformers
        from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeSparseMLP
    except ImportError as error:
        raise ImportError(f"transformers with NLLB-MoE is not installed here: {mend}") from error
    if not transformers.__version__.startswith("4."):
        # Release 5 passes a one-hot mask as expert indices, so that experts 0 and 1 alone ever run.
        raise ImportError(f"transformers {transformers.__version__} runs experts 0 and 1 only: {mend}")
    return transformers.NllbMoeConfig, NllbMoeSparseMLP
