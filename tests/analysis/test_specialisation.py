"""Numbers about routing: closed forms, invariants on random tables, and experts left out of a real layer."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_edu.analysis.specialisation import (
    coactivation,
    coactivation_lift,
    entropy,
    load_matrix,
    mean_by_label,
    measure_information,
    miller_madow_bias,
    mutual_information,
    rank_by_activity,
    route_without,
    silence,
    without_experts,
)
from moe_edu.moe.layer import SparseMLP
from moe_edu.moe.loops import loop_sparse_mlp
from moe_edu.moe.routing import top2_gating

tables = st.integers(1, 5).flatmap(
    lambda rows: st.integers(1, 5).flatmap(
        lambda columns: st.lists(
            st.lists(st.integers(0, 9), min_size=columns, max_size=columns), min_size=rows, max_size=rows
        )
    )
)


def tokens_of(table):
    """One (row, column) pair for each count of the table."""
    rows, columns = np.indices(table.shape)
    repeat = lambda values: torch.from_numpy(np.repeat(values.flatten(), table.numpy().flatten()))  # noqa: E731
    return repeat(rows), repeat(columns)


class TestLoadMatrix:
    def test_counts_every_choice_of_each_label(self):
        labels = torch.tensor([0, 0, 1])
        choices = torch.tensor([[2, 0], [2, 1], [0, -1]])
        assert load_matrix(labels, choices, 2, 3).tolist() == [[1, 1, 2], [1, 0, 0]]
        assert load_matrix(labels, choices[:, 0], 2, 3).tolist() == [[0, 0, 2], [1, 0, 0]]

    def test_padding_is_not_counted(self):
        routing = top2_gating(torch.randn(6, 4), capacity=6, padding=torch.tensor([False] * 4 + [True] * 2))
        assert load_matrix(torch.zeros(6, dtype=torch.long), routing.expert_index, 1, 4).sum() == 8

    @given(tables)
    def test_inverts_listing_the_tokens(self, rows):
        table = torch.tensor(rows)
        labels, experts = tokens_of(table)
        assert torch.equal(load_matrix(labels, experts, *table.shape), table)

    @pytest.mark.parametrize(
        ("labels", "choices"), [([0, 2], [0, 0]), ([-1, 0], [0, 0]), ([0, 0], [0, 3]), ([0], [0, 0])]
    )
    def test_refuses_invalid_arguments(self, labels, choices):
        with pytest.raises(ValueError, match=r"must (be|lie)"):
            load_matrix(torch.tensor(labels), torch.tensor(choices), 2, 3)


class TestEntropyAndInformation:
    def test_closed_forms(self):
        assert entropy(torch.ones(8)).item() == pytest.approx(3)
        assert entropy(torch.tensor([5, 0, 0])).item() == 0
        assert entropy(torch.tensor([1, 3])).item() == pytest.approx(2 - 0.75 * math.log2(3))
        assert entropy(torch.tensor([[1, 1], [0, 0]])).tolist() == [1, 0]

    def test_a_label_that_decides_the_expert_reveals_all(self):
        assert mutual_information(torch.eye(8).mul(7).long()) == pytest.approx(3)

    def test_a_label_that_does_not_matter_reveals_nothing(self):
        assert mutual_information(torch.tensor([[2, 4, 6], [3, 6, 9]])) == pytest.approx(0, abs=1e-12)

    def test_a_binary_symmetric_channel(self):
        # Shannon 1948: 1 - H(error) with an even input.
        error = 0.125
        expected = 1 + error * math.log2(error) + (1 - error) * math.log2(1 - error)
        assert mutual_information(torch.tensor([[7, 1], [1, 7]])) == pytest.approx(expected)

    @given(tables)
    def test_bounds_and_symmetry(self, rows):
        table = torch.tensor(rows)
        bits = mutual_information(table)
        assert 0 <= bits <= min(entropy(table.sum(1)), entropy(table.sum(0))) + 1e-9
        assert bits == pytest.approx(mutual_information(table.T), abs=1e-9)

    @given(tables)
    def test_agrees_with_the_sum_over_cells(self, rows):
        table = torch.tensor(rows)
        p = table.double() / max(int(table.sum()), 1)
        ratio = p / (p.sum(1, keepdim=True) * p.sum(0, keepdim=True)).clamp(min=1e-300)
        expected = torch.where(p > 0, p * ratio.clamp(min=1e-300).log2(), 0.0).sum().item()
        assert mutual_information(table) == pytest.approx(max(expected, 0), abs=1e-9)

    def test_miller_madow_is_what_independent_tokens_seem_to_reveal(self):
        generator = torch.Generator().manual_seed(0)
        found, predicted = [], []
        for _ in range(200):
            labels, experts = torch.randint(0, 6, (2, 2000), generator=generator)
            table = load_matrix(labels, experts, 6, 6)
            found.append(mutual_information(table))
            predicted.append(miller_madow_bias(table))
        assert np.mean(found) == pytest.approx(np.mean(predicted), rel=0.1)


class TestMeasureInformation:
    @given(tables.filter(lambda rows: sum(map(sum, rows)) > 0))
    def test_agrees_with_the_table(self, rows):
        table = torch.tensor(rows)
        labels, experts = tokens_of(table)
        measured = measure_information(labels, experts, permutations=2)
        assert measured.bits == pytest.approx(mutual_information(table), abs=1e-9)
        assert measured.entropy == pytest.approx(float(entropy(table.sum(1))), abs=1e-9)
        assert measured.above_chance == measured.bits - measured.chance

    def test_without_a_relation_only_chance_remains(self):
        labels, experts = torch.randint(0, 5, (2, 3000))
        measured = measure_information(labels, experts, permutations=50)
        assert abs(measured.above_chance) < 4 * measured.chance_std

    def test_a_relation_is_far_above_chance(self):
        labels = torch.randint(0, 5, (3000,))
        experts = torch.where(torch.rand(3000) < 0.3, labels, torch.randint(0, 5, (3000,)))
        measured = measure_information(labels, experts)
        assert measured.above_chance > 20 * measured.chance_std

    def test_whole_sentences_are_not_mistaken_for_a_relation(self):
        # 60 sentences whose 50 tokens all go to one expert, whatever the language: single tokens look related.
        sentence = torch.arange(60).repeat_interleave(50)
        language = torch.randint(0, 4, (60,))[sentence]
        experts = torch.randint(0, 4, (60,))[sentence]
        by_sentence = measure_information(language, experts, sentence=sentence, permutations=100)
        by_token = measure_information(language, experts, permutations=100)
        assert by_sentence.bits == by_token.bits
        assert abs(by_sentence.above_chance) < 4 * by_sentence.chance_std
        assert by_token.above_chance > 20 * by_token.chance_std

    def test_beyond_the_token_a_router_that_reads_only_tokens_reveals_nothing(self):
        token = torch.randint(0, 6, (4000,))
        language = (token + torch.randint(0, 2, (4000,))) % 3  # tokens hint at the language
        expert = token % 4
        assert measure_information(language, expert).above_chance > 0.1
        assert measure_information(language, expert, given=token).bits == pytest.approx(0, abs=1e-9)

    def test_beyond_the_token_a_router_that_reads_the_language_reveals_all(self):
        token, language = torch.randint(0, 3, (2, 4000))
        measured = measure_information(language, language, given=token)
        assert measured.bits == pytest.approx(measured.entropy)
        assert measured.entropy == pytest.approx(math.log2(3), abs=0.01)

    def test_shuffling_within_tokens_keeps_what_the_token_reveals(self):
        # If the shuffle mixed tokens, chance would lose the dependence of language on token and be off.
        token = torch.arange(2000) % 2
        measured = measure_information(token, torch.randint(0, 3, (2000,)), given=token)
        assert measured.bits == measured.chance == pytest.approx(0, abs=1e-12)

    def test_a_seed_gives_the_same_result(self):
        labels, experts = torch.randint(0, 5, (2, 200))
        assert measure_information(labels, experts, seed=3) == measure_information(labels, experts, seed=3)
        assert (
            measure_information(labels, experts, seed=3).chance != measure_information(labels, experts).chance
        )

    def test_errors_name_the_cause(self):
        one, two = torch.tensor([0, 1]), torch.tensor([0, 0])
        with pytest.raises(ValueError, match="two labels"):
            measure_information(one, one, sentence=two)
        with pytest.raises(ValueError, match="leave one of them out"):
            measure_information(one, one, sentence=one, given=one)
        with pytest.raises(ValueError, match="without negative values"):
            measure_information(one, -one)
        with pytest.raises(ValueError, match="no tokens"):
            measure_information(one[:0], one[:0])


class TestCoactivation:
    def test_counts_ordered_pairs(self):
        choices = torch.tensor([[0, 1], [0, 1], [1, 2], [2, -1], [-1, -1]])
        assert coactivation(choices, 3).tolist() == [[0, 2, 0], [0, 0, 1], [0, 0, 0]]

    @given(tables.filter(lambda rows: sum(map(sum, rows)) > 0))
    def test_lift_is_one_on_average_weighted_by_what_is_expected(self, rows):
        counts = torch.tensor(rows).double()
        expected = counts.sum(1, keepdim=True) * counts.sum(0, keepdim=True) / counts.sum()
        lift = coactivation_lift(counts)
        assert (lift * expected).sum() == pytest.approx(float(counts.sum()))
        assert torch.isfinite(lift).all()

    def test_no_preference_is_a_lift_of_one(self):
        assert torch.allclose(
            coactivation_lift(torch.tensor([[2, 4], [3, 6]])), torch.ones(2, 2, dtype=torch.double)
        )


def test_activity_ranks_the_busiest_first_and_breaks_ties_by_number():
    assert rank_by_activity(torch.tensor([3, 9, 3, 0])) == [1, 0, 2, 3]
    assert rank_by_activity(torch.tensor([[1, 0], [0, 5]])) == [1, 0]


def test_mean_by_label():
    means = mean_by_label(
        torch.tensor([True, False, True, True]), torch.tensor([0, 0, 2, 2]), num_labels=3
    ).tolist()
    assert means[0] == 0.5
    assert math.isnan(means[1])
    assert means[2] == 1


class TestLeavingExpertsOut:
    @given(removed=st.sets(st.integers(0, 4), min_size=1, max_size=4), seed=st.integers(0, 99))
    def test_rerouting_is_routing_among_the_others(self, tiny_config, removed, seed):
        logits = torch.randn(12, 5, generator=torch.Generator().manual_seed(seed))
        padding = torch.tensor([False] * 10 + [True] * 2)
        config = tiny_config(num_experts=5)
        routing = top2_gating(logits, capacity=7, padding=padding)
        again = route_without(routing, sorted(removed), config)
        others = sorted(set(range(5)) - removed)
        direct = top2_gating(logits[:, others], capacity=7, padding=padding)
        index = torch.tensor([*others, -1])[direct.expert_index]
        assert torch.equal(again.expert_index, index)
        assert torch.equal(again.kept, direct.kept)
        assert torch.allclose(again.combine_weights, direct.combine_weights)

    def test_rerouting_without_unused_experts_changes_nothing(self, tiny_config):
        logits = torch.randn(6, 5)
        logits[:, 3] = -50
        routing = top2_gating(logits, capacity=6)
        again = route_without(routing, [3], tiny_config(num_experts=5))
        assert torch.equal(again.expert_index, routing.expert_index)
        assert torch.equal(again.combine_weights, routing.combine_weights)

    def test_silence_only_removes_the_expert_from_the_sum(self):
        routing = top2_gating(torch.randn(20, 4), capacity=20)
        quiet = silence(routing, [1])
        expected = routing.combine_matrix()
        expected[:, 1] = 0
        assert torch.equal(quiet.combine_matrix(), expected)
        assert torch.equal(quiet.expert_index, routing.expert_index)

    @pytest.mark.parametrize("how", ["reroute", "silence"])
    def test_the_layer_computes_what_the_loop_computes_without_the_expert(self, tiny_config, how):
        config = tiny_config(num_experts=4)
        layer = SparseMLP(config).eval()
        hidden = torch.randn(2, 5, config.d_model)
        before, routing = layer(hidden)
        with without_experts(layer, [2, 0], how):
            changed, again = layer(hidden)
        expected_routing = (
            route_without(routing, [2, 0], config) if how == "reroute" else silence(routing, [2, 0])
        )
        expected = loop_sparse_mlp(hidden.flatten(0, 1), expected_routing, layer.experts).view_as(hidden)
        assert torch.allclose(changed, expected, atol=1e-6)
        assert not torch.allclose(changed, before, atol=1e-3)
        assert not (again.expert_index[again.kept] == 2).any()
        after, _ = layer(hidden)
        assert torch.equal(after, before)

    def test_the_layer_is_restored_even_after_an_error(self, tiny_config):
        layer = SparseMLP(tiny_config()).eval()
        hidden = torch.randn(1, 3, layer.config.d_model)
        before, _ = layer(hidden)
        with pytest.raises(ValueError, match="no expert 9"), without_experts(layer, [9]):
            layer(hidden)
        assert torch.equal(layer(hidden)[0], before)

    def test_errors_name_the_cause(self, tiny_config):
        config = tiny_config(num_experts=3)
        layer = SparseMLP(config).eval()
        routing = top2_gating(torch.randn(4, 3), capacity=4)
        with pytest.raises(ValueError, match="at least one expert must remain"):
            route_without(routing, [0, 1, 2], config)
        with pytest.raises(ValueError, match="there is no expert 3"):
            silence(routing, [3])
        with pytest.raises(ValueError, match="reroute, silence"), without_experts(layer, [0], "remove"):
            pass
