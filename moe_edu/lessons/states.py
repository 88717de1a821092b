"""What a router reads: the hidden states from which a translator's first sparse layer chooses experts."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from moe_edu.model.pretrained import TextTranslator
from moe_edu.moe.routing import Top2Router


def router_states(translator: TextTranslator, texts: Iterable[str]) -> Tensor:
    """The inputs `[N, D]` of the encoder's first router, one row per token of `texts` (at least one), in order.

    Raises:
        ValueError: a text longer than the model's positions.
    """
    router = next(module for module in translator.model.encoder.modules() if isinstance(module, Top2Router))
    states: list[Tensor] = []
    hook = router.register_forward_hook(lambda _, inputs, __: states.append(inputs[0].flatten(0, 1)))
    try:
        for text in texts:
            translator.route(text)
    finally:
        hook.remove()
    return torch.cat(states)
