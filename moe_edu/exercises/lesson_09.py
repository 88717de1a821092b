"""Exercises of lesson 09, what sparsity buys and how it scales."""

from __future__ import annotations

import math

import torch

from moe_edu.exercises.exercise import Exercise, Mistake


def _integer(generator: torch.Generator, low: int, high: int) -> int:
    """One number from `low` to `high`."""
    return int(torch.randint(low, high + 1, (1,), generator=generator))


def active_parameters(total: int, of_one_expert: int, experts: int, layers: int) -> int:
    """Parameters on a token's path in a top-2 model of `total` parameters and `layers` sparse layers."""
    return total - layers * (experts - 2) * of_one_expert


def _draw_parameters(generator: torch.Generator) -> tuple[int, int, int, int]:
    of_one, experts, layers = (_integer(generator, *ends) for ends in ((50, 5000), (3, 128), (2, 12)))
    return layers * experts * of_one + _integer(generator, 1000, 100_000), of_one, experts, layers


_ACTIVE = Exercise(
    key="09.1",
    title="What a token pays for",
    task="Write `active_parameters`: leave out, in every sparse layer, the experts that a token does not choose.",
    difficulty="easy",
    importance="essential",
    minutes=5,
    solution=active_parameters,
    draw=_draw_parameters,
    mistakes=(
        Mistake(
            lambda total, of_one_expert, experts, layers: total - layers * (experts - 1) * of_one_expert,
            "A token runs two experts in each sparse layer, not one.",
        ),
        Mistake(
            lambda total, of_one_expert, experts, layers: total - layers * experts * of_one_expert,
            "You left out every expert. A token does run two of them in each sparse layer.",
        ),
        Mistake(
            lambda total, of_one_expert, experts, layers: total - (experts - 2) * of_one_expert,
            "You left out the idle experts of one layer only.",
        ),
        Mistake(
            lambda total, of_one_expert, experts, layers: total * 2 // experts,
            "Only the experts are idle. Every token uses the embeddings, attention and the router.",
        ),
    ),
    hints=(
        "How many experts of one layer are idle for a token?",
        "Idle weights: layers times idle experts times the size of one.",
    ),
)


def spread(values: list[float]) -> tuple[float, float]:
    """One number per seed -> (mean, sample standard deviation)."""
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))


def _draw_values(generator: torch.Generator) -> tuple[list[float]]:
    return (torch.rand(_integer(generator, 3, 6), generator=generator).tolist(),)


def _spread_of_all(values: list[float]) -> tuple[float, float]:
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))


def _spread_of_mean(values: list[float]) -> tuple[float, float]:
    mean, deviation = spread(values)
    return mean, deviation / math.sqrt(len(values))


def _variance(values: list[float]) -> tuple[float, float]:
    mean, deviation = spread(values)
    return mean, deviation**2


_SPREAD = Exercise(
    key="09.2",
    title="Never from one seed",
    task="Write `spread`: the mean over the seeds, and the sample standard deviation, which divides by n − 1.",
    difficulty="easy",
    importance="important",
    minutes=5,
    solution=spread,
    draw=_draw_values,
    mistakes=(
        Mistake(
            _spread_of_all,
            "You divide by n, as if you had run every seed there is. A sample's deviation divides by n − 1.",
        ),
        Mistake(_variance, "That is the variance: take its square root."),
        Mistake(
            _spread_of_mean,
            "That is the standard error of the mean, which shrinks with n; the task asks how much single runs differ.",
        ),
    ),
    hints=(
        "Square each value's distance from the mean, and add them up.",
        "Divide by `len(values) - 1`; then `math.sqrt`.",
    ),
)


def best_margin(dense: dict[float, float], sparse: dict[float, float]) -> float:
    """Learning rate -> recall, for both. Returns by how much sparse wins, each at its own best rate."""
    return max(sparse.values()) - max(dense.values())


def _draw_rates(generator: torch.Generator) -> tuple[dict[float, float], dict[float, float]]:
    rates = (0.001, 0.003, 0.01, 0.03)
    dense, sparse = (dict(zip(rates, torch.rand(4, generator=generator).tolist(), strict=True)) for _ in "ds")
    return dense, sparse


_MARGIN = Exercise(
    key="09.3",
    title="Tune both",
    task="Write `best_margin`: how much better is sparse when each model has the learning rate that suits it best?",
    difficulty="easy",
    importance="essential",
    minutes=5,
    solution=best_margin,
    draw=_draw_rates,
    mistakes=(
        Mistake(
            lambda dense, sparse: max(sparse[rate] - dense[rate] for rate in dense),
            "You picked the one rate at which the gap is widest: that is the trap, not the way out of it.",
        ),
        Mistake(
            lambda dense, sparse: max(sparse.values()) - dense[max(sparse, key=sparse.__getitem__)],
            "You tuned sparse, and made dense run at the rate that suits sparse.",
        ),
        Mistake(
            lambda dense, sparse: sum(sparse.values()) / len(sparse) - sum(dense.values()) / len(dense),
            "A mean over rates rewards the model that tolerates bad rates. Compare the best with the best.",
        ),
    ),
    hints=("Each model gets its own maximum.", "`max(d.values())` is the best recall that a model reached."),
)


def slots_sent(tokens: int, experts: int, devices: int, factor: float) -> int:
    """`tokens` per device, `experts // devices` experts on each -> the slots that a device sends."""
    capacity = math.ceil(factor * 2 * math.ceil(tokens / experts))
    return (experts - experts // devices) * capacity


def _draw_cluster(generator: torch.Generator) -> tuple[int, int, int, float]:
    devices = 2 ** _integer(generator, 1, 4)
    experts = devices * 2 ** _integer(generator, 1, 3)
    tokens = experts * _integer(generator, 1, 40) + _integer(generator, 1, experts - 1)
    return tokens, experts, devices, _integer(generator, 2, 8) / 4


def _slots_with_own(tokens: int, experts: int, devices: int, factor: float) -> int:
    return experts * math.ceil(factor * 2 * math.ceil(tokens / experts))


def _slots_of_all_devices(tokens: int, experts: int, devices: int, factor: float) -> int:
    capacity = math.ceil(factor * 2 * math.ceil(tokens * devices / experts))
    return (experts - experts // devices) * capacity


def _slots_less_one(tokens: int, experts: int, devices: int, factor: float) -> int:
    return (experts - 1) * math.ceil(factor * 2 * math.ceil(tokens / experts))


_SLOTS = Exercise(
    key="09.4",
    title="Who sends what",
    task="Write `slots_sent`. A device reserves `ceil(factor * 2 * ceil(tokens / experts))` slots for every expert, "
    "and sends away those for experts on other devices.",
    difficulty="medium",
    importance="important",
    minutes=8,
    solution=slots_sent,
    draw=_draw_cluster,
    mistakes=(
        Mistake(
            _slots_with_own,
            "Slots for the experts on the device itself are not sent.",
        ),
        Mistake(_slots_less_one, "A device holds `experts // devices` experts, more than one here."),
        Mistake(
            _slots_of_all_devices,
            "The capacity counts the tokens of one device: each device has its own buffers.",
        ),
    ),
    hints=(
        "How many experts are on the device, and how many on others?",
        "`(experts - experts // devices)` experts on other devices, `capacity` slots for each.",
    ),
)

_REPLICAS = Exercise(
    key="09.5",
    title="A smaller cluster",
    task="You train NLLB-MoE's 128 experts on 64 GPUs instead of 256, with 4,096 tokens on each. How many experts does "
    "one GPU hold?",
    difficulty="easy",
    importance="helpful",
    minutes=2,
    solution=2,
    mistakes=(
        Mistake(1, "That was with 128 GPUs or more. Now every GPU has to take more."),
        Mistake(0.5, "There are more experts than GPUs, not the other way round."),
        Mistake(4, "There are a quarter of the GPUs, but before, every expert was on two of them."),
    ),
    hints=("Each of the 128 experts must be on some GPU.", "128 experts are divided among 64 GPUs."),
)

EXERCISES = (_ACTIVE, _SPREAD, _MARGIN, _SLOTS, _REPLICAS)
