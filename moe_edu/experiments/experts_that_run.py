"""Which experts of the installed `transformers` run, and what its balancing loss sees: `docs/differences.md`.

`python -m moe_edu.experiments.experts_that_run` prints both for the release that this Python has, 4.57.6 or 5.x, by
that release's own classes. It downloads nothing: the layer and the model are tiny, with random weights.
"""

from __future__ import annotations

from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_edu.moe.router_losses import load_balancing_loss
from moe_edu.moe.routing import top2_gating

D = 8
T, E = 8, 4  # of the balancing losses


class Experts(NamedTuple):
    """Numbers of a layer's experts: those that some token chose, and those that computed at least one row."""

    chosen: list[int]
    ran: list[int]


def experts_of_a_layer(num_experts: int = 8, tokens: int = 20) -> Experts:
    """Send random tokens through one sparse layer of the release, with room for all of them, and watch its experts."""
    from transformers import NllbMoeConfig
    from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeSparseMLP

    torch.manual_seed(0)
    layer = NllbMoeSparseMLP(NllbMoeConfig(d_model=D, num_experts=num_experts), ffn_dim=12).eval()
    gates: list[Tensor] = []
    rows = [0] * num_experts

    def keep_gates(_module: Any, _inputs: Any, output: tuple[Tensor, ...]) -> None:
        gates.append(output[1].view(tokens, num_experts))

    def count_rows(expert: int, _module: Any, inputs: tuple[Tensor, ...], _output: Any) -> None:
        rows[expert] += inputs[0].numel() // D

    layer.router.register_forward_hook(keep_gates)
    for expert in range(num_experts):
        layer.experts[f"expert_{expert}"].register_forward_hook(partial(count_rows, expert))
    with torch.no_grad():
        layer(torch.randn(1, tokens, D), torch.zeros(tokens, dtype=torch.bool))  # nothing is padding
    chosen = gates[0].any(dim=0).nonzero().flatten().tolist()
    return Experts(chosen, [expert for expert in range(num_experts) if rows[expert]])


def router_pairs() -> dict[str, tuple[Tensor, Tensor]]:
    """What the routers of two layers say, logits `[T, E]` each, by a description."""
    first = torch.arange(T) % E
    even = 4.0 * F.one_hot(first, E) + 2.0 * F.one_hot((first + 1) % E, E)
    low = torch.tensor([4.0, 2.0, 0.0, 0.0]).expand(T, E)
    return {
        "both use all experts evenly": (even, even),
        "the first uses experts 0 and 1": (low, even),
        "the second uses experts 0 and 1": (even, low),
        "the first uses 0 and 1, the second 2 and 3": (low, low.flip(1)),
    }


def published_loss(logits: tuple[Tensor, Tensor]) -> float:
    """`encoder_aux_loss` of the release for a model whose two sparse encoder layers are given these logits `[T, E]`."""
    from transformers import NllbMoeConfig, NllbMoeForConditionalGeneration

    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in (("layers", 2), ("attention_heads", 2), ("ffn_dim", D), ("sparse_step", 1))
    }
    model = NllbMoeForConditionalGeneration(NllbMoeConfig(vocab_size=20, d_model=D, num_experts=E, **sizes))
    for layer, said in zip(model.model.encoder.layers, logits, strict=True):
        layer.ffn.router.classifier.register_forward_hook(partial(_say, said))
    ids = torch.arange(5, 5 + T)[None]
    with torch.no_grad():
        return float(model.eval()(input_ids=ids, labels=ids, output_router_logits=True).encoder_aux_loss)


def _say(logits: Tensor, _module: Any, _inputs: Any, output: Tensor) -> Tensor:
    return logits.clone().view_as(output)


def our_loss(logits: tuple[Tensor, Tensor]) -> float:
    """Ours for the same layers: each layer is balanced on its own, then the mean is taken."""
    routings = [top2_gating(of_layer, capacity=T) for of_layer in logits]
    losses = [load_balancing_loss(routing.probs, routing.expert_index) for routing in routings]
    return float(torch.stack(losses).mean())


def main() -> None:
    try:
        release = version("transformers")
    except PackageNotFoundError:
        raise SystemExit("transformers is not installed: run `pip install transformers==4.57.6`") from None
    chosen, ran = experts_of_a_layer()
    print(f"transformers {release}, one sparse layer of 8 experts, 20 tokens")
    print(f"  experts chosen: {' '.join(map(str, chosen))}")
    print(f"  experts run:    {' '.join(map(str, ran))}")
    print(f"Balancing loss of two layers of {E} experts{'transformers':>22} {'moe_edu':>8}")
    for description, logits in router_pairs().items():
        print(f"  {description:46} {published_loss(logits):12.2f} {our_loss(logits):8.2f}")


if __name__ == "__main__":
    main()
