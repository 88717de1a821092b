import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_edu import MoEConfig, expert_capacity, top2_gating
from moe_edu.analysis.traffic import Cluster, experts_on, holders, layer_traffic, rows_sent
from moe_edu.moe.experts import Experts
from moe_edu.moe.routing import count_per_expert


def test_nllb_moe_on_its_256_gpus():
    nllb = Cluster()
    assert (nllb.replicas, nllb.experts_per_device, nllb.group_size) == (2, 1, 128)
    assert nllb.capacity == 64  # 4,096 tokens make 8,192 choices, 64 for each of 128 experts
    assert holders(nllb, 5) == (5, 133)
    traffic = layer_traffic(nllb)
    assert traffic.message == 64 * 2048 * 2
    assert traffic.all_to_all == 127 * traffic.message == 33_292_288
    assert traffic.between_nodes == 120 * traffic.message
    assert traffic.step == 2 * traffic.forward == 4 * traffic.all_to_all
    assert traffic.model_step == 12 * traffic.step
    assert nllb.expert_bytes == 2 * (2 * 2048 * 8192 + 8192 + 2048)


def test_capacity_and_weights_are_those_of_the_layer():
    cluster = Cluster(
        experts=8, devices=4, tokens_per_device=100, d_model=6, ffn_dim=10, capacity_factor=1.25
    )
    config = MoEConfig(d_model=6, encoder_attention_heads=2, decoder_attention_heads=2, num_experts=8,
                       expert_capacity_factor=1.25)  # fmt: skip
    assert cluster.capacity == expert_capacity(100, config, training=True)
    weights = sum(p.numel() for p in Experts(config, ffn_dim=10).parameters())
    assert cluster.expert_bytes * 8 == weights * cluster.bytes_per_element


shapes = st.tuples(st.integers(0, 5), st.integers(0, 5)).map(lambda p: (2 ** p[0], 2 ** p[1]))


@given(shapes)
def test_every_expert_is_held_once_in_each_group(shape):
    experts, devices = shape
    cluster = Cluster(experts=experts, devices=devices, tokens_per_device=32)
    for expert in range(experts):
        homes = holders(cluster, expert)
        assert [home // cluster.group_size for home in homes] == list(range(cluster.replicas))
        assert all(expert in experts_on(cluster, home) for home in homes)
    assert sum(len(experts_on(cluster, g)) for g in range(devices)) == experts * cluster.replicas


@given(shapes)
def test_an_even_router_sends_what_the_padded_buffers_hold(shape):
    experts, devices = shape
    cluster = Cluster(experts=experts, devices=devices, tokens_per_device=32, devices_per_node=2)
    sent = rows_sent(cluster, [[cluster.capacity] * experts for _ in range(devices)])
    traffic = layer_traffic(cluster)
    for g, row in enumerate(sent):
        away = sum(row) - row[g]
        assert away * cluster.token_bytes == traffic.all_to_all
        other_nodes = sum(count for h, count in enumerate(row) if h // 2 != g // 2)
        assert other_nodes * cluster.token_bytes == traffic.between_nodes
        assert all(
            count == 0 for h, count in enumerate(row) if h // cluster.group_size != g // cluster.group_size
        )


def test_every_row_of_real_routing_arrives():
    cluster = Cluster(experts=4, devices=8, tokens_per_device=10, d_model=3)
    torch.manual_seed(0)
    routings = [top2_gating(torch.randn(10, 4), capacity=cluster.capacity) for _ in range(8)]
    kept = [count_per_expert(r.expert_index.where(r.kept, -1), 4).tolist() for r in routings]
    sent = rows_sent(cluster, kept)
    assert [sum(row) for row in sent] == [int(r.kept.sum()) for r in routings]
    for expert in range(4):
        received = sum(sent[g][home] for home in holders(cluster, expert) for g in range(8))
        assert received == sum(row[expert] for row in kept)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"experts": 6, "devices": 4}, "6 experts cannot be divided evenly among 4 devices"),
        ({"experts": 12, "devices": 12}, "groups of 12 devices and nodes of 8 do not fit together"),
        ({"devices": 0}, "devices must be positive"),
        ({"capacity_factor": 0.0}, "capacity_factor must be positive"),
    ],
)
def test_impossible_clusters(fields, message):
    with pytest.raises(ValueError, match=message):
        Cluster(**fields)


def test_unknown_experts_and_devices_are_refused():
    cluster = Cluster(experts=4, devices=2)
    with pytest.raises(IndexError, match="no expert 4"):
        holders(cluster, 4)
    with pytest.raises(IndexError, match="no device -1"):
        experts_on(cluster, -1)
    with pytest.raises(ValueError, match=r"\[2 devices\]\[4 experts\]"):
        rows_sent(cluster, [[1, 2, 3, 4]])
