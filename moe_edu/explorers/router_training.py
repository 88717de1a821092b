"""A router that trains while you move the weights of its two losses: the smallest setting in which it collapses.

Six words, each with its four features and a part that all words share. Expert e holds one vector, and a word's output
is the vector of its best expert, times the probability (one choice per word, as in Switch Transformer). Router and
experts learn by plain gradient descent to reproduce the word's own features, in float64.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from moe_edu.analysis.six_words import LANGUAGES, WORDS, six_words
from moe_edu.explorers.explorer import Explorer, Slider, State, View
from moe_edu.explorers.wording import fixed

STEPS = 150
LEARNING_RATE = 0.5
NUM_EXPERTS = 4
SEEDS = 8
_DECIMALS = 8

Array = NDArray[np.float64]


class Step(NamedTuple):
    """One step of the training.

    Attributes:
        probs: `[T, E]`.
        expert: `[T]`, the first choice of each word.
        load: `[E]`, share of the words whose first choice is e.
        error, balance, z: the three losses, unweighted.
    """

    probs: Array
    expert: NDArray[np.int64]
    load: Array
    error: float
    balance: float
    z: float


class Weights(NamedTuple):
    """`router` `[E, D]`, one row per expert, and `vectors` `[E, D]`, the output of each expert."""

    router: Array
    vectors: Array


def first_weights(seed: int) -> Weights:
    """Small random numbers, rounded so that the page starts from exactly the same ones."""
    generator = torch.Generator().manual_seed(seed)
    numbers = 0.3 * torch.randn(2, NUM_EXPERTS, 5, generator=generator, dtype=torch.float64)
    return Weights(*numbers.round(decimals=4).numpy())


def inputs(shared: float) -> Array:
    """The six words `[6, 5]`: their features, and the part that they share."""
    features = six_words(torch.float64).hidden.numpy()
    return np.concatenate([features, np.full((len(WORDS), 1), shared)], axis=1)


def step(
    x: Array, weights: Weights, router_aux_loss_coef: float, router_z_loss_coef: float
) -> tuple[Step, Weights]:
    """Measure `x [T, D]`, and take one step down the gradient, written out by hand."""
    T, E = len(x), NUM_EXPERTS
    logits = x @ weights.router.T
    top = logits.max(axis=1, keepdims=True)
    exps = np.exp(logits - top)
    probs = exps / exps.sum(axis=1, keepdims=True)
    log_z = (top + np.log(exps.sum(axis=1, keepdims=True)))[:, 0]
    expert = probs.argmax(axis=1)
    gate = probs[np.arange(T), expert]
    miss = gate[:, None] * weights.vectors[expert] - x
    load = np.bincount(expert, minlength=E) / T
    measured = Step(
        probs=probs,
        expert=expert,
        load=load,
        error=float((miss**2).sum(axis=1).mean()),
        balance=float(E * (load * probs.mean(axis=0)).sum()),
        z=float((log_z**2).mean()),
    )
    by_probs = np.tile(
        router_aux_loss_coef * E * load / T, (T, 1)
    )  # the load is a count: no gradient flows through it
    by_probs[np.arange(T), expert] += 2 / T * (miss * weights.vectors[expert]).sum(axis=1)
    by_logits = probs * (by_probs - (by_probs * probs).sum(axis=1, keepdims=True))
    by_logits += router_z_loss_coef * 2 / T * log_z[:, None] * probs
    by_vectors = np.zeros_like(weights.vectors)
    np.add.at(by_vectors, expert, 2 / T * gate[:, None] * miss)
    # Rounded, so that the page, whose exp differs in the last digit, follows exactly the same path.
    return measured, Weights(
        (weights.router - LEARNING_RATE * (by_logits.T @ x)).round(_DECIMALS),
        (weights.vectors - LEARNING_RATE * by_vectors).round(_DECIMALS),
    )


def train(
    router_aux_loss_coef: float, router_z_loss_coef: float, shared: float, seed: int, steps: int = STEPS
) -> list[Step]:
    """Every step of one training run."""
    x, weights, history = inputs(shared), first_weights(seed), []
    for _ in range(steps):
        measured, weights = step(x, weights, router_aux_loss_coef, router_z_loss_coef)
        history.append(measured)
    return history


def view(state: State) -> View:
    """Train from the first step on.

    Returns:
        `expert` `[T]` and `probs` `[T, E]` at the last step; `load` `[steps, E]`, `error`, `balance` and `z` `[steps]`;
        `alive`, the experts that some word still chooses.
    """
    history = train(state["balance"], state["z"], state["shared"], state["seed"])
    last = history[-1]
    alive = int((last.load > 0).sum())
    if alive == 1:
        sentence = f"The router has collapsed: all six words go to expert {int(last.expert[0])}."
    else:
        busiest = round(len(WORDS) * float(last.load.max()))
        sentence = f"{alive} of {NUM_EXPERTS} experts are in use; the busiest has {busiest} of the six words."
    return {
        "expert": last.expert.tolist(),
        "probs": last.probs.tolist(),
        "load": [measured.load.tolist() for measured in history],
        "error": [measured.error for measured in history],
        "balance": [measured.balance for measured in history],
        "z": [measured.z for measured in history],
        "alive": alive,
        "sentence": (
            f"{sentence} At step {STEPS}, the error is {fixed(last.error)}, the balancing loss "
            f"{fixed(last.balance)} and the z-loss {fixed(last.z)}."
        ),
        "met": [
            state["shared"] >= 1 and alive == NUM_EXPERTS,
            state["balance"] == 0 and alive >= 2,
            last.z < 0.2 and alive == NUM_EXPERTS,
        ],
    }


EXPLORER = Explorer(
    name="router_training",
    title="A router that trains as you move the weights",
    purpose="Each change trains the router again. Which experts get work, and what does each loss cost?",
    fields=(
        Slider("balance", "Balance weight", 0.0, 1.0, 0.05, 0.0),
        Slider("z", "z-loss weight", 0.0, 0.2, 0.01, 0.0),
        Slider("shared", "Shared part of words", 0.0, 2.0, 0.1, 1.0),
        Slider("seed", "Seed", 1, SEEDS, 1, 1),
    ),
    challenges=(
        "Keep all four experts in use with a shared part of at least 1.",
        "Without any balancing, keep at least two experts in use.",
        "Bring the z-loss below 0.2 with all four experts in use.",
    ),
    view=view,
    solutions=({"balance": 0.5}, {"shared": 0.0}, {"balance": 0.5, "z": 0.05}),
    height=376,
    data={
        "words": WORDS,
        "languages": LANGUAGES,
        "features": six_words(torch.float64).hidden.tolist(),
        "steps": STEPS,
        "rate": LEARNING_RATE,
        "weights": [[part.tolist() for part in first_weights(seed)] for seed in range(1, SEEDS + 1)],
    },
)
