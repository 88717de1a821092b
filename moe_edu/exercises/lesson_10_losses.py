"""Bugs in published router losses: which layers, probabilities and terms they include."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_edu.exercises.exercise import Exercise, Mistake
from moe_edu.exercises.lesson_10_router import NLLB, randint

MIXTRAL = "`modeling_mixtral.py`"


# ---- 10.13


def total_loss(
    cross_entropy: Tensor,
    balance: Tensor,
    logits: Tensor,
    router_aux_loss_coef: float,
    router_z_loss_coef: float,
) -> Tensor:
    """Two scalars and the router's logits [T, E] -> the training loss, a scalar."""
    z_loss = logits.logsumexp(dim=1).square().mean()
    return cross_entropy + router_aux_loss_coef * balance + router_z_loss_coef * z_loss


def _published_total_loss(
    cross_entropy: Tensor,
    balance: Tensor,
    logits: Tensor,
    router_aux_loss_coef: float,
    router_z_loss_coef: float,
) -> Tensor:
    """Two scalars and the router's logits [T, E] -> the training loss, a scalar."""
    return cross_entropy + router_aux_loss_coef * balance


def _draw_loss_parts(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, float, float]:
    T, E = randint(generator, 4, 9), randint(generator, 2, 4)
    cross_entropy, balance = 1 + torch.rand(2, generator=generator)
    return (
        cross_entropy,
        balance,
        3 * torch.randn(T, E, generator=generator),
        0.01,
        randint(generator, 1, 9) / 10,
    )


def _total_without_square(
    cross_entropy: Tensor,
    balance: Tensor,
    logits: Tensor,
    router_aux_loss_coef: float,
    router_z_loss_coef: float,
) -> Tensor:
    return (
        cross_entropy + router_aux_loss_coef * balance + router_z_loss_coef * logits.logsumexp(dim=1).mean()
    )


def _total_over_words(
    cross_entropy: Tensor,
    balance: Tensor,
    logits: Tensor,
    router_aux_loss_coef: float,
    router_z_loss_coef: float,
) -> Tensor:
    return total_loss(cross_entropy, balance, logits.T, router_aux_loss_coef, router_z_loss_coef)


_TOTAL_LOSS = Exercise(
    key="10.13",
    title="A knob that does nothing",
    task="The configuration has a coefficient for the router z-loss. Use it: add the mean over words of the squared "
    "logsumexp. **The test:** every coefficient changes the loss.",
    difficulty="easy",
    importance="important",
    minutes=3,
    solution=total_loss,
    starter=_published_total_loss,
    origin=f"transformers 4.57.6, {NLLB}",
    draw=_draw_loss_parts,
    mistakes=(
        Mistake(_total_without_square, "Without the square, large negative logits would be rewarded."),
        Mistake(
            _total_over_words,
            "Your logsumexp runs over the words. It must run over the experts, once per word.",
        ),
    ),
    hints=(
        "Which argument is never read?",
        "`logits.logsumexp(dim=1)` gives [T]. Square it, then take the mean.",
    ),
)


# ---- 10.14


def decoder_routing(outputs: dict[str, Tensor | None]) -> Tensor | None:
    """A model's outputs by name, None if not requested -> what the decoder's routers returned."""
    return outputs["decoder_router_logits"]


def _published_decoder_routing(outputs: dict[str, Tensor | None]) -> Tensor | None:
    """A model's outputs by name, None if not requested -> what the decoder's routers returned."""
    given = [value for value in outputs.values() if value is not None]
    return given[3 if outputs["decoder_attentions"] is not None else 4]


_OUTPUTS = (
    "last_hidden_state",
    "past_key_values",
    "decoder_hidden_states",
    "decoder_attentions",
    "decoder_router_logits",
    "cross_attentions",
    "encoder_last_hidden_state",
    "encoder_hidden_states",
    "encoder_attentions",
    "encoder_router_logits",
)


def _draw_model_outputs(generator: torch.Generator) -> tuple[dict[str, Tensor | None]]:
    attentions, hidden_states = (randint(generator, 0, 2) == 1 for _ in range(2))
    values = torch.rand(len(_OUTPUTS), 3, generator=generator)
    outputs: dict[str, Tensor | None] = dict(zip(_OUTPUTS, values, strict=True))
    for name in _OUTPUTS:
        if ("attentions" in name and not attentions) or ("hidden_states" in name and not hidden_states):
            outputs[name] = None
    return (outputs,)


def _encoder_routing(outputs: dict[str, Tensor | None]) -> Tensor | None:
    return outputs["encoder_router_logits"]


def _third_output(outputs: dict[str, Tensor | None]) -> Tensor | None:
    return [value for value in outputs.values() if value is not None][2]


_DECODER_ROUTING = Exercise(
    key="10.14",
    title="Picked by position",
    task="The decoder's balancing loss equals the encoder's, number for number. Fix it. **The test:** the loss of a "
    "router has a gradient for that router.",
    difficulty="easy",
    importance="important",
    minutes=3,
    solution=decoder_routing,
    starter=_published_decoder_routing,
    origin=f"transformers 4.57.6, {NLLB}",
    draw=_draw_model_outputs,
    mistakes=(
        Mistake(_encoder_routing, "That is the encoder's, which is what the published code often returns."),
        Mistake(_third_output, "That position is right only if nobody asks for hidden states or attentions."),
    ),
    hints=(
        "Write down what `given` holds if no attentions are requested. What is number 4, counted from 0?",
        "The outputs have names.",
    ),
)


# ---- 10.15


def balancing_loss(probs: list[Tensor], first: list[Tensor]) -> Tensor:
    """Each layer's probs [T, E] and first choices [T] -> the mean of the layers' balancing losses."""
    losses = []
    for p, expert in zip(probs, first, strict=True):
        E = p.shape[1]
        f = F.one_hot(expert, E).float().mean(dim=0)
        losses.append(E * (f * p.mean(dim=0)).sum())
    return torch.stack(losses).mean()


def _published_balancing_loss(probs: list[Tensor], first: list[Tensor]) -> Tensor:
    """Each layer's probs [T, E] and first choices [T] -> the mean of the layers' balancing losses."""
    p = torch.cat(probs, dim=1)
    E = p.shape[1]
    f = F.one_hot(torch.stack(first, dim=1), E).float().mean(dim=(0, 1))
    return E * (f * p.mean(dim=0)).sum()


def _draw_layers(generator: torch.Generator) -> tuple[list[Tensor], list[Tensor]]:
    L, T, E = randint(generator, 2, 4), randint(generator, 5, 9), randint(generator, 3, 6)
    probs = (2 * torch.randn(L, T, E, generator=generator)).softmax(dim=2)
    return list(probs), list(probs.argmax(dim=2))


def _balancing_loss_of_all_words(probs: list[Tensor], first: list[Tensor]) -> Tensor:
    return balancing_loss([torch.cat(probs)], [torch.cat(first)])


def _balancing_loss_summed(probs: list[Tensor], first: list[Tensor]) -> Tensor:
    return len(probs) * balancing_loss(probs, first)


_BALANCING_LOSS = Exercise(
    key="10.15",
    title="The layers that nobody balances",
    task="With two sparse layers, this loss has no gradient for the second. Fix it: return the mean of the layers' "
    "losses. **The test:** collapse any layer, and the loss rises.",
    difficulty="hard",
    importance="essential",
    minutes=7,
    solution=balancing_loss,
    starter=_published_balancing_loss,
    origin=f"transformers 4.57.6, {NLLB}",
    draw=_draw_layers,
    mistakes=(
        Mistake(
            _balancing_loss_of_all_words,
            "You pooled the words of all layers: expert 0 of one layer is not expert 0 of the next.",
        ),
        Mistake(_balancing_loss_summed, "That is the sum over the layers, which grows with their number."),
    ),
    hints=(
        "Two layers of 4 experts become one of 8. Which of the 8 can `first` name?",
        "Compute the loss of each layer separately, then `torch.stack(losses).mean()`.",
    ),
)


# ---- 10.16


def balancing_loss_of_logits(logits: list[Tensor]) -> Tensor:
    """Router logits [T, E] of each layer -> the mean of the layers' losses, over two choices per word."""
    losses = []
    for layer in logits:
        probs = layer.softmax(dim=1)
        f = F.one_hot(probs.topk(2).indices, probs.shape[1]).float().mean(dim=0).sum(dim=0)
        losses.append(probs.shape[1] * (f * probs.mean(dim=0)).sum())
    return torch.stack(losses).mean()


def _published_balancing_loss_of_logits(logits: list[Tensor]) -> Tensor:
    """Router logits [T, E] of each layer -> the mean of the layers' losses, over two choices per word."""
    probs = torch.cat(logits).softmax(dim=1)
    f = F.one_hot(probs.topk(2).indices, probs.shape[1]).float().mean(dim=0).sum(dim=0)
    return probs.shape[1] * (f * probs.mean(dim=0)).sum()


def _draw_logits_of_layers(generator: torch.Generator) -> tuple[list[Tensor]]:
    L, T, E = randint(generator, 2, 4), randint(generator, 5, 9), randint(generator, 3, 6)
    return (list(2 * torch.randn(L, T, E, generator=generator)),)


def _balancing_loss_of_mean_logits(logits: list[Tensor]) -> Tensor:
    return balancing_loss_of_logits([torch.stack(logits).mean(dim=0)])


def _balancing_loss_of_one_choice(logits: list[Tensor]) -> Tensor:
    probs = [layer.softmax(dim=1) for layer in logits]
    return balancing_loss(probs, [p.argmax(dim=1) for p in probs])


_BALANCING_LOSS_OF_LOGITS = Exercise(
    key="10.16",
    title="Two collapses that look even",
    task="One layer sends every word to experts 0 and 1, another to 2 and 3: this loss calls it perfect. Fix it. "
    "**The test:** a collapse is never cancelled.",
    difficulty="medium",
    importance="essential",
    minutes=5,
    solution=balancing_loss_of_logits,
    starter=_published_balancing_loss_of_logits,
    origin=f"transformers 4.57.6, {MIXTRAL}",
    draw=_draw_logits_of_layers,
    mistakes=(
        Mistake(
            _balancing_loss_of_mean_logits,
            "You averaged the layers' logits: a mean can be even where no layer is.",
        ),
        Mistake(
            _balancing_loss_of_one_choice,
            "Treating each layer separately is right, but both choices of a word count here.",
        ),
    ),
    hints=(
        "Where are the words of two layers mixed?",
        "Do the same for one layer at a time, and take the mean of the results.",
    ),
)


EXERCISES = (_TOTAL_LOSS, _DECODER_ROUTING, _BALANCING_LOSS, _BALANCING_LOSS_OF_LOGITS)
