"""The cluster: spread the experts over devices, pick a sender, and see how many bytes each other device gets."""

from __future__ import annotations

from typing import Any

from moe_edu.analysis.traffic import Cluster, experts_on, holders, layer_traffic
from moe_edu.explorers.explorer import Choice, Explorer, Slider, State, View
from moe_edu.explorers.wording import count, fixed

_SIZES = (8, 16, 32, 64, 128, 256, 512)
_NLLB = Cluster()


def to_cluster(state: State) -> Cluster:
    """The cluster that a state describes; sizes without a control are NLLB-MoE's."""
    return Cluster(
        experts=int(state["experts"]),
        devices=int(state["devices"]),
        tokens_per_device=state["tokens"],
        capacity_factor=state["factor"],
        bytes_per_element=int(state["precision"]),
    )


def view(state: State) -> View:
    """Count what one device sends.

    Returns:
        `sender` (device), `holds` (its first and last expert), `copies` (devices with the same experts), `group`
        (first and last device that it exchanges tokens with), `capacity` slots, and in bytes `message` (to each of
        them), `inside` and `between` nodes in one all-to-all, `step` (all sparse layers, forward and backward),
        `weights` (of the experts it holds, one layer) and `all_weights` (of all experts of the layer).
    """
    cluster = to_cluster(state)
    traffic = layer_traffic(cluster)
    sender = state["sender"] % cluster.devices
    held = experts_on(cluster, sender)
    first = sender // cluster.group_size * cluster.group_size
    copies = [device for device in holders(cluster, held[0]) if device != sender]
    others = cluster.group_size - 1
    sentence = (
        f"GPU {sender} sends {cluster.capacity * cluster.experts_per_device} slots "
        f"({size(traffic.message)}) to each of {count(others, 'other GPU')}: {size(traffic.all_to_all)} in one "
        f"all-to-all, {size(traffic.between_nodes)} of it to other nodes. "
        f"With four per layer and {cluster.sparse_layers} sparse layers, that is {size(traffic.model_step)} per step."
    )
    if copies:
        holds = "holds" if len(copies) == 1 else "hold"
        sentence += (
            f" {count(len(copies), 'more GPU')} {holds} the same expert; their gradients must be averaged."
        )
    return {
        "shown": {"sender": str(sender)},
        "sender": sender,
        "holds": [held[0], held[-1]],
        "copies": copies,
        "group": [first, first + others],
        "capacity": cluster.capacity,
        "message": traffic.message,
        "inside": traffic.all_to_all - traffic.between_nodes,
        "between": traffic.between_nodes,
        "step": traffic.model_step,
        "weights": cluster.experts_per_device * cluster.expert_bytes,
        "all_weights": cluster.experts * cluster.expert_bytes,
        "sentence": sentence,
        "met": [
            cluster.replicas == 4,
            traffic.between_nodes == 0 and cluster.devices >= 64,
            cluster.experts >= 128 and traffic.model_step < 0.5e9,
        ],
    }


def size(number: float) -> str:
    """Bytes with a unit that keeps the number short: "33.3 MB"."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= scale:
            return f"{fixed(number / scale, 2 if number < 10 * scale else 1)} {unit}"
    return f"{number} B"


def _sizes() -> tuple[tuple[str, str], ...]:
    return tuple((str(n), str(n)) for n in _SIZES)


def _data() -> dict[str, Any]:
    return {
        "devices_per_node": _NLLB.devices_per_node,
        "d_model": _NLLB.d_model,
        "ffn_dim": _NLLB.ffn_dim,
        "choices": _NLLB.choices,
        "sparse_layers": _NLLB.sparse_layers,
    }


EXPLORER = Explorer(
    name="cluster",
    title="The cluster",
    purpose="Choose how many GPUs share the experts; click one, or move the slider, to see where it sends tokens.",
    fields=(
        Choice("experts", "Experts", _sizes(), str(_NLLB.experts)),
        Choice("devices", "GPUs", _sizes(), str(_NLLB.devices)),
        Slider("tokens", "Tokens per GPU", 512, 8192, 512, _NLLB.tokens_per_device),
        Slider("factor", "Capacity factor", 0.5, 2.0, 0.25, _NLLB.capacity_factor),
        Choice("precision", "Number format", (("4", "fp32"), ("2", "fp16, bf16"), ("1", "fp8")), "2"),
        Slider("sender", "Sending GPU", 0, 511, 1, 21),
    ),
    challenges=(
        "Keep every expert on exactly four GPUs.",
        "With 64 GPUs or more, keep all tokens inside their node.",
        "With 128 experts or more, send less than 0.5 GB per step.",
    ),
    view=view,
    solutions=(
        {"experts": "64"},
        {"experts": "8", "devices": "64"},
        {"tokens": 1024},
    ),
    height=304,
    data=_data(),
)
