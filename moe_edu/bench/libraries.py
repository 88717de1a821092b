"""Sparse layers of other libraries with our layer's weights and, where possible, our routing.

Each function builds a contender from an installed library, or raises ImportError with one line on what is missing.
Experts of other libraries have no biases, which makes no difference: the benchmark's biases are zero. Libraries
without a capacity also compute the choices that found no room, with a gate of zero.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from moe_edu.bench.contenders import Contender, gradient_of
from moe_edu.moe.layer import FeedForward, SparseMLP
from moe_edu.moe.routing import RouterOutput, Top2Router

REFERENCE = "transformers 4"


def reference_layer(layer: SparseMLP) -> Contender:
    """`NllbMoeSparseMLP` of transformers 4.x with the weights and the mode of `layer`.

    Raises:
        ImportError: transformers is not installed, or is a release whose layer runs only two experts.
        ValueError: the layer is not in float32.
    """
    hf_config, sparse_mlp = _import_reference()
    if layer.experts.w1.dtype != torch.float32:
        raise ValueError("it rounds its probabilities before it compares them, so its routing differs")
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
        # Views, so that the weights are in memory only once.
        expert.fc1.weight = nn.Parameter(layer.experts.w1.detach()[e])
        expert.fc1.bias = nn.Parameter(layer.experts.b1.detach()[e])
        expert.fc2.weight = nn.Parameter(layer.experts.w2.detach()[e])
        expert.fc2.bias = nn.Parameter(layer.experts.b2.detach()[e])

    def forward(hidden: Tensor) -> Tensor:
        # The module stores its last capacity and would reuse it; None means 2 * ceil(T / E).
        module.router.expert_capacity = None
        return module(hidden, None)[0]

    def probes() -> list[Tensor | None]:
        first = module.experts["expert_0"]
        parameters = (first.fc1.weight, first.fc1.bias, first.fc2.weight, first.fc2.bias)
        return [gradient_of(p) for p in (module.router.classifier.weight, *parameters)]

    return Contender(module.train(layer.training), forward, probes)


def reference_is_here() -> str | None:
    """None if transformers' layer can be imported, else what to do about it."""
    try:
        _import_reference()
    except ImportError as error:
        return str(error)
    return None


def transformers_experts(back_end: str, layer: SparseMLP) -> Contender:
    """Stacked experts of transformers 5 with its back end "eager" or "grouped_mm".

    These are Nemotron-H's, which compute the same function as ours. Mixtral's use the same back ends but are gated.
    """
    fix = "stacked experts need release 5, in a separate environment"
    transformers = _import("transformers", fix)
    if transformers.__version__.startswith("4."):
        raise ImportError(f"transformers {transformers.__version__} is installed: {fix}")
    nemotron = _import("transformers.models.nemotron_h.modeling_nemotron_h", fix)
    E, F, D = layer.experts.w1.shape
    config = transformers.NemotronHConfig(
        hidden_size=D, n_routed_experts=E, moe_intermediate_size=F, mlp_hidden_act="relu"
    )
    config._experts_implementation = back_end
    with torch.device("meta"):
        experts = nemotron.NemotronHExperts(config)
    experts.up_proj = nn.Parameter(layer.experts.w1.detach())
    experts.down_proj = nn.Parameter(layer.experts.w2.detach())

    def forward(hidden: Tensor) -> Tensor:
        routing = layer.router(hidden)
        return experts(hidden[0], routing.expert_index, routing.combine_weights.to(hidden.dtype))[None]

    def gradients() -> tuple[Tensor, Tensor]:
        return gradient_of(experts.up_proj), gradient_of(experts.down_proj)

    return _without_biases(layer, experts, forward, gradients)


def st_moe(layer: SparseMLP) -> Contender:
    """The layer of st-moe-pytorch: its dispatch, its loop over experts and its combine, around our feed-forwards.

    Its one-hot tensors get as many slots as the busiest expert has rows, so that nothing is dropped or wasted.
    """
    library = _import("st_moe_pytorch", "`pip install st-moe-pytorch`")
    E, F, D = layer.experts.w1.shape
    with torch.device("meta"):
        feed_forwards = [FeedForward(layer.config, F) for _ in range(E)]
    for e, ffn in enumerate(feed_forwards):
        ffn.fc1.weight, ffn.fc1.bias = (
            nn.Parameter(t.detach()[e]) for t in (layer.experts.w1, layer.experts.b1)
        )
        ffn.fc2.weight, ffn.fc2.bias = (
            nn.Parameter(t.detach()[e]) for t in (layer.experts.w2, layer.experts.b2)
        )
    module = library.MoE(dim=D, num_experts=E, experts=nn.ModuleList(feed_forwards))
    module.gate = _OneHotGate(layer.router)

    def probes() -> list[Tensor | None]:
        first = feed_forwards[0]
        parameters = (first.fc1.weight, first.fc1.bias, first.fc2.weight, first.fc2.bias)
        return [gradient_of(p) for p in (layer.router.classifier.weight, *parameters)]

    return Contender(module.train(layer.training), lambda hidden: module(hidden).outputs, probes)


class _OneHotGate(nn.Module):
    """Our routing in the format of st-moe-pytorch: (dispatch, combine, balance loss, z-loss)."""

    def __init__(self, router: Top2Router) -> None:
        super().__init__()
        self.router = router

    def forward(self, hidden: Tensor, **_: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        routing = self.router(hidden)
        token, choice = routing.kept.nonzero(as_tuple=True)
        place = (token, routing.expert_index[token, choice], routing.position[token, choice])
        slots = int(routing.position[token, choice].max()) + 1
        empty = hidden.new_zeros(routing.num_tokens, routing.num_experts, slots)
        weights = routing.combine_weights[token, choice].to(hidden.dtype)
        dispatch, combine = empty.index_put(place, torch.ones_like(weights)), empty.index_put(place, weights)
        return dispatch[None], combine[None], hidden.new_zeros(()), hidden.new_zeros(())


def scattermoe(layer: SparseMLP) -> Contender:
    """ScatterMoE's MLP (Tan et al. 2024), whose Triton kernels need a GPU."""
    require_gpu(layer)
    library = _import("scattermoe.mlp", "`pip install git+https://github.com/shawntan/scattermoe`")
    E, F, D = layer.experts.w1.shape
    with torch.device("meta"):
        module = library.MLP(input_size=D, hidden_size=F, num_experts=E, top_k=2, activation=nn.ReLU())
    module.experts.weight = nn.Parameter(layer.experts.w1.detach())
    module.output_experts.weight = nn.Parameter(layer.experts.w2.detach())

    def forward(hidden: Tensor) -> Tensor:
        routing = layer.router(hidden)
        return module(hidden[0], routing.combine_weights.to(hidden.dtype), routing.expert_index)[None]

    def gradients() -> tuple[Tensor, Tensor]:
        return gradient_of(module.experts.weight), gradient_of(module.output_experts.weight)

    return _without_biases(layer, module, forward, gradients)


def megablocks(layer: SparseMLP) -> Contender:
    """MegaBlocks' dropless layer (Gale et al. 2022) with its grouped products, which need a GPU."""
    require_gpu(layer)
    fix = "`pip install megablocks grouped_gemm`"
    dmoe, arguments = _import("megablocks.layers.dmoe", fix), _import("megablocks.layers.arguments", fix)
    E, F, D = layer.experts.w1.shape
    dtype = layer.experts.w1.dtype
    module = dmoe.dMoE(
        arguments.Arguments(
            hidden_size=D,
            ffn_hidden_size=F,
            bias=False,
            return_bias=False,
            activation_fn=torch.nn.functional.relu,
            moe_num_experts=E,
            moe_top_k=2,
            moe_loss_weight=0,  # otherwise it keeps every step's scores for the loss
            mlp_impl="grouped",
            fp16=dtype == torch.float16,
            bf16=dtype == torch.bfloat16,
            device=layer.experts.w1.device,
        )
    )
    mlp = module.experts.mlp
    mlp.w1 = nn.Parameter(layer.experts.w1.detach().reshape(E * F, D))
    mlp.w2 = nn.Parameter(layer.experts.w2.detach().mT.reshape(E * F, D))
    module.router = _ScoresGate(layer.router)

    def gradients() -> tuple[Tensor, Tensor]:
        # The second weight is stored transposed.
        return gradient_of(mlp.w1).view(E, F, D), gradient_of(mlp.w2).view(E, F, D).mT

    return _without_biases(layer, module, module, gradients)


class _ScoresGate(nn.Module):
    """Our routing in the format of MegaBlocks: (scores, expert weights, expert indices)."""

    def __init__(self, router: Top2Router) -> None:
        super().__init__()
        self.router = router

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        routing: RouterOutput = self.router(hidden)
        return routing.probs, routing.combine_weights.to(hidden.dtype), routing.expert_index


def require_gpu(layer: SparseMLP) -> None:
    """Raise ImportError if `layer` is not on a GPU."""
    if layer.experts.w1.device.type != "cuda":
        raise ImportError("it needs a GPU")


def _without_biases(
    layer: SparseMLP,
    module: nn.Module,
    forward: Callable[[Tensor], Tensor],
    gradients: Callable[[], tuple[Tensor, Tensor]],
) -> Contender:
    """A contender with our router and no biases; `gradients` gives those of w1 `[E, F, D]` and w2 `[E, D, F]`."""

    def probes() -> list[Tensor | None]:
        w1, w2 = gradients()
        return [gradient_of(layer.router.classifier.weight), w1[0], None, w2[0], None]

    return Contender(nn.ModuleList([layer.router, module]).train(layer.training), forward, probes)


def _import(name: str, fix: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"not installed: {fix}") from error


def _import_reference() -> tuple[Any, Any]:
    fix = "run `pip install transformers==4.57.6` to compare with transformers"
    try:
        import transformers
        from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeSparseMLP
    except ImportError as error:
        raise ImportError(f"transformers with NLLB-MoE is not installed here: {fix}") from error
    if not transformers.__version__.startswith("4."):
        # Release 5 passes a one-hot mask as expert indices, so that only experts 0 and 1 ever run.
        raise ImportError(f"transformers {transformers.__version__} runs only experts 0 and 1: {fix}")
    return transformers.NllbMoeConfig, NllbMoeSparseMLP
