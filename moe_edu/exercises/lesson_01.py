"""Exercises of lesson 01, from dense to sparse."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_edu.exercises.exercise import Exercise, Mistake


def _integers(generator: torch.Generator, low: int, high: int, count: int) -> list[int]:
    return torch.randint(low, high, (count,), generator=generator).tolist()


# ---- 01.1


def layer_norm(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """hidden [T, D], weight [D], bias [D] -> [T, D]; epsilon is 1e-5."""
    mean = hidden.mean(dim=1, keepdim=True)
    variance = hidden.var(dim=1, correction=0, keepdim=True)
    return (hidden - mean) / torch.sqrt(variance + 1e-5) * weight + bias


def _draw_norm(generator: torch.Generator) -> tuple[Tensor, ...]:
    T, D = _integers(generator, 3, 8, 2)
    hidden = 3 * torch.randn(T, D, generator=generator) + 1
    return hidden, 1 + torch.rand(D, generator=generator), torch.randn(D, generator=generator)


def _norm_over_words(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    spread = torch.sqrt(hidden.var(dim=0, correction=0) + 1e-5)
    return (hidden - hidden.mean(dim=0)) / spread * weight + bias


def _norm_by_n_minus_1(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    spread = torch.sqrt(hidden.var(dim=1, keepdim=True) + 1e-5)
    return (hidden - hidden.mean(dim=1, keepdim=True)) / spread * weight + bias


def _norm_by_variance(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    variance = hidden.var(dim=1, correction=0, keepdim=True)
    return (hidden - hidden.mean(dim=1, keepdim=True)) / (variance + 1e-5) * weight + bias


def _norm_without_weight(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(hidden, weight.shape)


_LAYER_NORM = Exercise(
    key="01.1",
    title="Layer norm",
    task="Write `layer_norm`: give each word mean 0 and variance 1 over its features (add 1e-5 to the variance), then "
    "scale by `weight` and shift by `bias`.",
    difficulty="easy",
    importance="important",
    minutes=5,
    solution=layer_norm,
    draw=_draw_norm,
    mistakes=(
        Mistake(
            _norm_over_words,
            "You took the mean and the variance over the words. A word must not depend on its neighbours here: use "
            "its own D features.",
        ),
        Mistake(
            _norm_by_n_minus_1,
            "Almost: `var` divides by D - 1 by default, but layer norm divides by D.",
        ),
        Mistake(
            _norm_by_variance,
            "You divided by the variance. Its square root has the same unit as the features.",
        ),
        Mistake(
            _norm_without_weight,
            "The normalisation is right. Now scale it by `weight` and shift it by `bias`.",
        ),
    ),
    hints=(
        "Which dimension holds the features of one word? Keep it, so that subtracting works row by row.",
        "`hidden.var(dim=1, correction=0, keepdim=True)` is the variance over the features.",
    ),
)

# ---- 01.2


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """query [L, D], key [S, D], value [S, D] -> [L, D]: one head of attention."""
    scores = query @ key.T / query.shape[1] ** 0.5
    return scores.softmax(dim=1) @ value


def _draw_attention(generator: torch.Generator) -> tuple[Tensor, ...]:
    L, S, D = _integers(generator, 2, 8, 3)
    S += S == L  # so that the two dimensions cannot be mistaken for each other
    return (
        2 * torch.randn(L, D, generator=generator),
        2 * torch.randn(S, D, generator=generator),
        torch.randn(S, D, generator=generator),
    )


def _attend_unscaled(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return (query @ key.T).softmax(dim=1) @ value


def _attend_over_queries(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return (query @ key.T / query.shape[1] ** 0.5).softmax(dim=0) @ value


def _attend_to_keys(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return (query @ key.T / query.shape[1] ** 0.5).softmax(dim=1) @ key


_ATTEND = Exercise(
    key="01.2",
    title="One head of attention",
    task="Write `attend`: score each query against each key by their dot product, divided by the square root of D. A "
    "softmax over the keys turns a query's scores into weights, and the query's output is the weighted sum of the "
    "values.",
    difficulty="medium",
    importance="important",
    minutes=8,
    solution=attend,
    draw=_draw_attention,
    mistakes=(
        Mistake(
            _attend_unscaled,
            "Your scores grow with D, which makes the softmax sharper: divide by the square root of D.",
        ),
        Mistake(
            _attend_over_queries,
            "Your softmax runs over the queries. Each query's weights over the keys must sum to 1.",
        ),
        Mistake(_attend_to_keys, "You mixed the keys. Keys say whom to listen to, values what is said."),
    ),
    hints=(
        "One product gives all scores: [L, D] times [D, S].",
        "Then take the `softmax` over the last dimension and multiply by `value`.",
    ),
)

# ---- 01.3


def sparse_layer_size(d_model: int, ffn_dim: int, num_experts: int) -> tuple[int, int]:
    """Parameters of a top-2 sparse layer, router included: (stored, used by one token)."""
    router = d_model * num_experts
    expert = 2 * d_model * ffn_dim + ffn_dim + d_model
    return router + num_experts * expert, router + 2 * expert


def _draw_sizes(generator: torch.Generator) -> tuple[int, int, int]:
    D, F_, E = _integers(generator, 3, 60, 3)
    return D, 4 * F_, E


def _size_without_biases(d_model: int, ffn_dim: int, num_experts: int) -> tuple[int, int]:
    router, expert = d_model * num_experts, 2 * d_model * ffn_dim
    return router + num_experts * expert, router + 2 * expert


def _size_without_router(d_model: int, ffn_dim: int, num_experts: int) -> tuple[int, int]:
    expert = 2 * d_model * ffn_dim + ffn_dim + d_model
    return num_experts * expert, 2 * expert


def _size_with_two_scores(d_model: int, ffn_dim: int, num_experts: int) -> tuple[int, int]:
    expert = 2 * d_model * ffn_dim + ffn_dim + d_model
    return d_model * num_experts + num_experts * expert, d_model * 2 + 2 * expert


_SIZE = Exercise(
    key="01.3",
    title="Stored and used",
    task="Write `sparse_layer_size`: the parameters that a sparse layer stores, and those that one token uses. The "
    "router is one matrix without a bias; an expert is two linear layers with biases, D to F and F to D; a token "
    "visits two experts.",
    difficulty="easy",
    importance="essential",
    minutes=6,
    solution=sparse_layer_size,
    draw=_draw_sizes,
    mistakes=(
        Mistake(_size_without_biases, "Experts have biases, F of them inside and D at the output."),
        Mistake(_size_without_router, "You left the router out: one row of D weights for each expert."),
        Mistake(
            _size_with_two_scores,
            "To choose two experts, the router has to score all of them: a token uses the whole router.",
        ),
    ),
    hints=(
        "Count one expert first: D to F with biases, F to D with biases.",
        "The router's D x E weights are in both answers. How many experts are in each?",
    ),
    tolerance=0.0,
)

# ---- 01.4


def sparse_ffn(hidden: Tensor, expert_index: Tensor, w1: Tensor, w2: Tensor) -> tuple[Tensor, int]:
    """hidden [T, D], expert_index [T], w1 [E, F, D], w2 [E, D, F] -> (output [T, D], rows multiplied)."""
    output, rows = torch.zeros_like(hidden), 0
    for expert in range(len(w1)):
        mine = expert_index == expert
        output[mine] = F.relu(hidden[mine] @ w1[expert].T) @ w2[expert].T
        rows += int(mine.sum())
    return output, rows


def _draw_layer(generator: torch.Generator) -> tuple[Tensor, ...]:
    """One expert is chosen by no word, and its infinite weights spoil whatever is multiplied by them."""
    T, D, F_, E = _integers(generator, 3, 8, 4)
    idle = _integers(generator, 0, E, 1)[0]
    w1 = torch.randn(E, F_, D, generator=generator)
    w1[idle] = torch.inf
    expert_index = (idle + torch.randint(1, E, (T,), generator=generator)) % E
    return (
        torch.randn(T, D, generator=generator),
        expert_index,
        w1,
        torch.randn(E, D, F_, generator=generator),
    )


def _every_expert_works(hidden: Tensor, expert_index: Tensor, w1: Tensor, w2: Tensor) -> tuple[Tensor, int]:
    """hidden [T, D], expert_index [T], w1 [E, F, D], w2 [E, D, F] -> (output [T, D], rows multiplied)."""
    output, rows = torch.zeros_like(hidden), 0
    for expert in range(len(w1)):
        everything = F.relu(hidden @ w1[expert].T) @ w2[expert].T
        rows += len(hidden)
        chosen = (expert_index == expert).float()[:, None]
        output = output + chosen * everything
    return output, rows


def _only_the_count_is_fixed(
    hidden: Tensor, expert_index: Tensor, w1: Tensor, w2: Tensor
) -> tuple[Tensor, int]:
    return _every_expert_works(hidden, expert_index, w1, w2)[0], len(hidden)


def _without_relu(hidden: Tensor, expert_index: Tensor, w1: Tensor, w2: Tensor) -> tuple[Tensor, int]:
    output = torch.stack([w2[e] @ (w1[e] @ word) for word, e in zip(hidden, expert_index, strict=True)])
    return output, len(hidden)


def _one_expert_for_all(hidden: Tensor, expert_index: Tensor, w1: Tensor, w2: Tensor) -> tuple[Tensor, int]:
    return F.relu(hidden @ w1[0].T) @ w2[0].T, len(hidden)


_SPARSE = Exercise(
    key="01.4",
    title="Real bug: every expert works for everybody",
    task="The output is right, but all savings are gone. Fix `sparse_ffn`: each expert multiplies only the words "
    "that chose it, and `rows` counts them.",
    difficulty="medium",
    importance="essential",
    minutes=8,
    solution=sparse_ffn,
    starter=_every_expert_works,
    origin="kyegomez/SwitchTransformers, issue 17",
    draw=_draw_layer,
    mistakes=(
        Mistake(
            _only_the_count_is_fixed,
            "Your count is right, but every expert still multiplies every word. Here an expert that nobody chose has "
            "infinite weights, and infinity times 0 is nan: pick the rows before the product.",
        ),
        Mistake(
            _without_relu,
            "The relu between the two products is gone; without it an expert is just one matrix.",
        ),
        Mistake(_one_expert_for_all, "All words went to expert 0: use `expert_index`."),
    ),
    hints=(
        "Pick the rows first, then multiply: a boolean mask picks rows of `hidden`.",
        "`output[mine] = ...` writes back to the rows that `mine` picked. `mine.sum()` counts them.",
    ),
)

# ---- 01.5


def sparse_layers(num_layers: int, sparse_step: int) -> list[int]:
    """The 0-based numbers of the layers that have experts."""
    return [layer for layer in range(num_layers) if sparse_step > 0 and (layer + 1) % sparse_step == 0]


def _remainder_one(num_layers: int, sparse_step: int) -> list[int]:
    """The 0-based numbers of the layers that have experts."""
    return [layer for layer in range(num_layers) if sparse_step > 0 and layer % sparse_step == 1]


def _draw_depth(generator: torch.Generator) -> tuple[int, int]:
    return _integers(generator, 4, 30, 1)[0], _integers(generator, 0, 7, 1)[0]


def _from_the_first(num_layers: int, sparse_step: int) -> list[int]:
    return [layer for layer in range(num_layers) if sparse_step > 0 and layer % sparse_step == 0]


def _counted_from_1(num_layers: int, sparse_step: int) -> list[int]:
    return [layer for layer in range(1, num_layers + 1) if sparse_step > 0 and layer % sparse_step == 0]


def _patched(num_layers: int, sparse_step: int) -> list[int]:
    return [
        layer
        for layer in range(num_layers)
        if sparse_step > 0 and (layer % sparse_step == 1 or sparse_step == 1)
    ]


_STEP = Exercise(
    key="01.5",
    title="Real bug: a step of one",
    task="Step 1 should make every layer sparse; this rule finds none. Write NLLB-MoE's rule instead: the last layer "
    "of each group of `sparse_step` has experts, and a step of 0 means none.",
    difficulty="easy",
    importance="helpful",
    minutes=5,
    solution=sparse_layers,
    starter=_remainder_one,
    origin="transformers' Switch Transformers, pull request 28564",
    draw=_draw_depth,
    cases=80,  # so that every step is among them
    mistakes=(
        Mistake(_from_the_first, "Yours starts each group with its sparse layer. NLLB-MoE ends it with one."),
        Mistake(_counted_from_1, "Right layers, but counted from 1: the first layer is number 0."),
        Mistake(
            _patched,
            "That is the pull request's patch: right for steps 1 and 2. With a step of 4 it takes layers 1, 5, 9; "
            "NLLB-MoE takes 3, 7, 11.",
        ),
    ),
    hints=(
        "What is any number modulo 1? So which remainder works for every step?",
        "Number the layers from 1 in your head: which of them are multiples of the step?",
    ),
    tolerance=0.0,
)

EXERCISES = (_LAYER_NORM, _ATTEND, _SIZE, _SPARSE, _STEP)
