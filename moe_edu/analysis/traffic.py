"""Expert parallelism in numbers: which device holds which expert, and how many bytes each sends to each.

Every device routes its own tokens, sends each kept choice to the device that holds the expert (dispatch), and gets the
expert's output back (combine): two all-to-alls per sparse layer, and two more for their gradients in the backward pass.

Shapes: T tokens per device, E experts, K choices per token, C capacity, D model width, F feed-forward width, G devices.
Sources: GShard (Lepikhin et al. 2020, section 3.2: experts spread over the devices; section 3.3.1: all-to-all;
algorithm 1: capacity per local group of tokens). fairseq's NLLB branch, `fairseq/modules/moe/moe_layer.py` (buffers of
`[E, C, D]`, padded to the capacity) and `get_all2all_group`, `get_moe_group` (more devices than experts: replicas).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """A sparse layer on many devices; the defaults are the released NLLB-MoE's training run.

    Source of the defaults: `examples/nllb/modeling` in fairseq: README.md (128 experts on 256 GPUs, every 4th layer of
    24 + 24), `train/conf/cfg/flores_200_full_moe.yaml` (4,096 tokens per GPU, 32 nodes of 8), `default.yaml` (fp16);
    D and F from the released `config.json`.

    Raises:
        ValueError: a number is not positive, neither of `devices` and `experts` divides the other, or neither the
            group size nor the node size does.
    """

    experts: int = 128
    devices: int = 256
    devices_per_node: int = 8
    tokens_per_device: int = 4096
    d_model: int = 2048
    ffn_dim: int = 8192
    bytes_per_element: int = 2
    choices: int = 2
    capacity_factor: float = 1.0
    sparse_layers: int = 12

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise ValueError(f"Cluster.{name} must be positive; got {value}")
        if self.devices % self.experts and self.experts % self.devices:
            raise ValueError(
                f"{self.experts} experts cannot be divided evenly among {self.devices} devices: "
                "let one number divide the other"
            )
        if self.group_size % self.devices_per_node and self.devices_per_node % self.group_size:
            raise ValueError(
                f"groups of {self.group_size} devices and nodes of {self.devices_per_node} do not fit together: "
                "let one number divide the other"
            )

    @property
    def replicas(self) -> int:
        """How many devices hold a copy of the same expert (fairseq: `replication_count`)."""
        return max(self.devices // self.experts, 1)

    @property
    def experts_per_device(self) -> int:
        return max(self.experts // self.devices, 1)

    @property
    def group_size(self) -> int:
        """How many devices exchange tokens: together they hold each expert once, and so does every other group."""
        return self.devices // self.replicas

    @property
    def capacity(self) -> int:
        """C: the slots that each device reserves for each expert, `K * ceil(T / E)` times the capacity factor."""
        return math.ceil(
            self.capacity_factor * self.choices * math.ceil(self.tokens_per_device / self.experts)
        )

    @property
    def token_bytes(self) -> int:
        """What one row costs to send, in bytes: a token's hidden state, D numbers."""
        return self.d_model * self.bytes_per_element

    @property
    def expert_bytes(self) -> int:
        """Weights and biases of one expert, `2 * D * F + F + D` numbers; replicas exchange gradients of this size."""
        return (2 * self.d_model * self.ffn_dim + self.ffn_dim + self.d_model) * self.bytes_per_element


class LayerTraffic(NamedTuple):
    """What one device sends for one sparse layer, in bytes, with buffers padded to the capacity.

    It receives as many. None of this depends on the router's choices.

    Attributes:
        message: to one other device of the group, in one all-to-all.
        all_to_all: to all other devices of the group together.
        between_nodes: the part of `all_to_all` that leaves the node.
        forward: dispatch and combine.
        step: forward and backward.
        model_step: forward and backward, for all sparse layers.
    """

    message: int
    all_to_all: int
    between_nodes: int
    forward: int
    step: int
    model_step: int


def layer_traffic(cluster: Cluster) -> LayerTraffic:
    """Count the bytes that one device sends for one sparse layer, and for all of them.

    >>> layer_traffic(Cluster()).message  # 64 slots of 2,048 half-precision numbers
    262144
    """
    message = cluster.experts_per_device * cluster.capacity * cluster.token_bytes
    others = cluster.group_size - 1
    neighbours = min(cluster.devices_per_node, cluster.group_size) - 1
    all_to_all = others * message
    return LayerTraffic(
        message=message,
        all_to_all=all_to_all,
        between_nodes=(others - neighbours) * message,
        forward=2 * all_to_all,
        step=4 * all_to_all,
        model_step=4 * all_to_all * cluster.sparse_layers,
    )


def holders(cluster: Cluster, expert: int) -> tuple[int, ...]:
    """The devices that hold `expert`, one in each group.

    Raises:
        IndexError: no such expert.
    """
    if not 0 <= expert < cluster.experts:
        raise IndexError(f"there is no expert {expert}: they are numbered 0 to {cluster.experts - 1}")
    place = expert // cluster.experts_per_device
    return tuple(place + group * cluster.group_size for group in range(cluster.replicas))


def experts_on(cluster: Cluster, device: int) -> range:
    """The experts that `device` holds.

    Raises:
        IndexError: no such device.
    """
    if not 0 <= device < cluster.devices:
        raise IndexError(f"there is no device {device}: they are numbered 0 to {cluster.devices - 1}")
    first = device % cluster.group_size * cluster.experts_per_device
    return range(first, first + cluster.experts_per_device)


def rows_sent(cluster: Cluster, kept: Sequence[Sequence[int]]) -> list[list[int]]:
    """How many rows each device sends to each in one dispatch, for actual routing and without padding.

    Args:
        kept: `[G][E]`; how many of device g's choices found room at expert e.

    Returns:
        `[G][G]`; entry `[g][h]` is what device g sends to device h, itself included. Combine sends the transpose;
        multiply by `token_bytes` for bytes. With an even router this is what `layer_traffic` counts.

    Raises:
        ValueError: `kept` does not have one row per device and one number per expert.
    """
    if len(kept) != cluster.devices or any(len(row) != cluster.experts for row in kept):
        raise ValueError(
            f"kept must be [{cluster.devices} devices][{cluster.experts} experts], one count for each pair"
        )
    sent = [[0] * cluster.devices for _ in range(cluster.devices)]
    for device, row in enumerate(kept):
        group = device // cluster.group_size
        for expert, count in enumerate(row):
            sent[device][holders(cluster, expert)[group]] += count
    return sent
