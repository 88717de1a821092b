"""The cluster explorer's numbers are those of `moe_edu.analysis.traffic`."""

import random

from moe_edu.analysis.traffic import experts_on, holders, layer_traffic
from moe_edu.explorers.cluster import EXPLORER, size, to_cluster, view


def test_it_opens_on_the_published_run():
    shown = view(EXPLORER.state())
    assert shown["capacity"] == 64
    assert shown["group"] == [0, 127]
    assert shown["copies"] == [21 + 128]
    assert shown["step"] == 12 * 4 * 127 * 64 * 2048 * 2
    assert "1 more GPU holds the same expert" in shown["sentence"]


def test_it_agrees_with_the_formulas_everywhere():
    rng = random.Random(0)
    for _ in range(100):
        state = EXPLORER.random_state(rng)
        cluster, shown = to_cluster(state), view(state)
        traffic = layer_traffic(cluster)
        assert (shown["message"], shown["between"]) == (traffic.message, traffic.between_nodes)
        assert shown["inside"] + shown["between"] == traffic.all_to_all
        held = experts_on(cluster, shown["sender"])
        assert shown["holds"] == [held[0], held[-1]]
        assert set(shown["copies"]) | {shown["sender"]} == set(holders(cluster, held[0]))
        assert shown["group"][0] <= shown["sender"] <= shown["group"][1]


def test_sizes_are_short():
    assert [size(n) for n in (0, 999, 262_144, 33_292_288, 8_590_000_000)] == [
        "0 B",
        "999 B",
        "262.1 kB",
        "33.3 MB",
        "8.59 GB",
    ]
