"""The router: invariants, edge cases, policies, and agreement with the loops."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from moe_edu.moe.loops import loop_gating
from moe_edu.moe.routing import Top2Router, count_per_expert, expert_capacity, queue_positions, top2_gating

POLICIES = ["all", "sampling", "random"]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@st.composite
def gating_cases(draw, policies=POLICIES, dtype=torch.float64):
    """Logits `[T, E]` and options; scale 0 makes ties everywhere, scale 300 makes probabilities underflow."""
    T, E = draw(st.integers(0, 14)), draw(st.integers(1, 6))
    generator = seeded(draw(st.integers(0, 2**31)))
    logits = torch.randn(T, E, generator=generator, dtype=torch.float64)
    scale = draw(st.sampled_from([0.0, 1.0, 5.0, 300.0]))
    if draw(st.booleans()):
        logits = logits.round()  # ties between some
    padding = None
    if draw(st.booleans()):
        padding = torch.rand(T, generator=generator) < draw(st.sampled_from([0.0, 0.3, 1.0]))
    options = {
        "capacity": draw(st.integers(0, T + 1)),
        "second_expert_policy": draw(st.sampled_from(policies)),
        "normalize_before_dropping": draw(st.booleans()),
        "batch_prioritized": draw(st.booleans()),
        "padding": padding,
    }
    return (scale * logits).to(dtype), options


def assert_same_routing(actual, expected, **tolerance):
    assert torch.equal(actual.expert_index, expected.expert_index)
    assert torch.equal(actual.position, expected.position)
    assert torch.equal(actual.kept, expected.kept)
    assert actual.capacity == expected.capacity
    torch.testing.assert_close(actual.combine_weights, expected.combine_weights, **tolerance)


class TestAgainstTheLoop:
    @given(gating_cases(), st.integers(0, 2**31))
    def test_same_decisions_gates_and_gradients(self, case, seed):
        logits, options = case
        fast, slow = logits.clone().requires_grad_(), logits.clone().requires_grad_()
        routing = top2_gating(fast, generator=seeded(seed), **options)
        expected = loop_gating(slow, generator=seeded(seed), **options)
        assert_same_routing(routing, expected)
        upstream = torch.randn(routing.combine_weights.shape, generator=seeded(seed), dtype=torch.float64)
        for result, leaf in ((routing, fast), (expected, slow)):
            # If nothing is kept, the loop's gates depend on no logit; adding zero times the sum gives a zero gradient.
            ((result.combine_weights * upstream).sum() + 0 * leaf.sum()).backward()
        torch.testing.assert_close(fast.grad, slow.grad)

    @given(gating_cases(dtype=torch.float32), st.integers(0, 2**31))
    def test_same_decisions_in_float32(self, case, seed):
        logits, options = case
        routing = top2_gating(logits, generator=seeded(seed), **options)
        assert_same_routing(routing, loop_gating(logits, generator=seeded(seed), **options))

    @given(gating_cases())
    def test_queue_positions_are_cumulative_sums(self, case):
        """GShard's definition: a running count over one-hot rows, with second choices after all first ones."""
        logits, options = case
        E = logits.shape[1]
        index = top2_gating(logits, **options).expert_index
        first, second = (F.one_hot(choice.where(choice >= 0, E), E + 1)[:, :E] for choice in index.unbind(1))
        places = torch.stack([first.cumsum(0) - 1, second.cumsum(0) - 1 + first.sum(0)], dim=1)  # [T, 2, E]
        expected = places.gather(2, index.clamp(min=0)[:, :, None])[:, :, 0].where(index >= 0, -1)
        assert torch.equal(queue_positions(index, E), expected)

    @given(gating_cases(), st.integers(0, 2**31))
    def test_an_order_is_a_reordering_of_the_batch(self, case, seed):
        logits, options = case
        index = top2_gating(logits, **options).expert_index
        order = torch.randperm(len(index), generator=seeded(seed))
        in_order = queue_positions(index[order], logits.shape[1])
        assert torch.equal(queue_positions(index, logits.shape[1], order)[order], in_order)


class TestInvariants:
    @given(gating_cases())
    def test_no_expert_keeps_more_than_its_capacity(self, case):
        routing = top2_gating(case[0], **case[1])
        counts = count_per_expert(routing.expert_index.where(routing.kept, -1), routing.num_experts)
        assert (counts <= routing.capacity).all()
        # No choice is turned away while there is room.
        wanted = count_per_expert(routing.expert_index, routing.num_experts)
        assert torch.equal(counts, wanted.clamp(max=routing.capacity))

    @given(gating_cases())
    def test_positions_are_0_to_n_within_each_expert(self, case):
        routing = top2_gating(case[0], **case[1])
        for e in range(routing.num_experts):
            places = routing.position[routing.expert_index == e].sort().values
            assert torch.equal(places, torch.arange(len(places)))

    @given(gating_cases())
    def test_second_choices_start_after_all_first_choices(self, case):
        """They start even after first choices that find no room."""
        routing = top2_gating(case[0], **case[1])
        first, second = routing.expert_index.unbind(1)
        for e in range(routing.num_experts):
            assert set(routing.position[first == e, 0].tolist()) == set(range(int((first == e).sum())))
            assert (routing.position[second == e, 1] >= (first == e).sum()).all()

    @given(gating_cases())
    def test_the_two_choices_differ(self, case):
        index = top2_gating(case[0], **case[1]).expert_index
        assert ((index[:, 0] != index[:, 1]) | (index[:, 0] == -1)).all()

    @given(gating_cases())
    def test_no_choice_is_minus_one_everywhere(self, case):
        routing = top2_gating(case[0], **case[1])
        none = routing.expert_index == -1
        assert torch.equal(none, routing.position == -1)
        assert not routing.kept[none].any()
        assert not routing.combine_weights[~routing.kept].any()

    @given(gating_cases())
    def test_gates_sum_to_one_or_zero_after_dropping(self, case):
        """This holds even where a probability underflows to zero: a lone survivor gets exactly 1."""
        logits, options = case
        routing = top2_gating(logits, **options | {"normalize_before_dropping": False})
        sums = routing.combine_weights.sum(1)
        torch.testing.assert_close(sums, routing.kept.any(1).to(sums.dtype))
        lone = routing.kept.sum(1) == 1
        assert (sums[lone] == 1).all()

    @given(gating_cases())
    def test_a_dropped_choice_loses_its_share_before_dropping(self, case):
        logits, options = case
        routing = top2_gating(logits, **options | {"normalize_before_dropping": True})
        roomy = top2_gating(
            logits, **options | {"normalize_before_dropping": True, "capacity": 2 * len(logits)}
        )
        if options["second_expert_policy"] == "all":
            expected = roomy.combine_weights * routing.kept
            torch.testing.assert_close(routing.combine_weights, expected)
        sums = routing.combine_weights.sum(1)
        assert (sums <= 1 + 1e-12).all()
        assert (routing.combine_weights >= 0).all()

    @given(gating_cases())
    def test_the_callers_tensors_stay_as_they_are(self, case):
        logits, options = case
        before, padding = logits.clone(), options["padding"]
        padding_before = None if padding is None else padding.clone()
        top2_gating(logits, **options)
        assert torch.equal(logits, before)
        assert padding is None or torch.equal(padding, padding_before)

    @given(gating_cases())
    def test_dense_views_agree_with_the_choices(self, case):
        routing = top2_gating(case[0], **case[1])
        combine, mask = routing.combine_matrix(), routing.dispatch_mask()
        T, E = case[0].shape
        assert combine.shape == (T, E)
        assert mask.shape == (T, E, routing.capacity)
        expected_combine, expected_mask = torch.zeros_like(combine), torch.zeros_like(mask)
        for t, k in routing.kept.nonzero().tolist():
            e = routing.expert_index[t, k]
            expected_combine[t, e] = routing.combine_weights[t, k]
            expected_mask[t, e, routing.position[t, k]] = True
        assert torch.equal(combine, expected_combine)
        assert torch.equal(mask, expected_mask)
        assert (mask.sum(0) <= 1).all(), "two tokens share a slot"

    @given(st.integers(2, 8), st.data())
    def test_every_expert_can_be_first_and_second(self, E, data):
        first, second = data.draw(st.permutations(range(E)))[:2]
        logits = torch.zeros(1, E)
        logits[0, first], logits[0, second] = 2.0, 1.0
        assert top2_gating(logits, capacity=2).expert_index.tolist() == [[first, second]]

    @given(gating_cases())
    def test_ties_go_to_the_lowest_index(self, case):
        logits, options = case
        index = top2_gating(
            torch.zeros_like(logits), **options | {"second_expert_policy": "all", "padding": None}
        ).expert_index
        second = 1 if logits.shape[1] > 1 else -1
        assert index.tolist() == [[0, second]] * len(logits)


class TestPadding:
    @given(gating_cases(policies=["all"]), st.integers(0, 2**31))
    def test_padding_chooses_no_expert_and_changes_no_other_token(self, case, seed):
        logits, options = case
        padding = torch.rand(len(logits), generator=seeded(seed)) < 0.5
        options = options | {"padding": padding}
        routing = top2_gating(logits, **options)
        assert (routing.expert_index[padding] == -1).all()
        assert not routing.kept[padding].any()
        assert not routing.combine_weights[padding].any()

        noise = 10 * torch.randn(logits.shape, generator=seeded(seed), dtype=logits.dtype)
        other_pads = top2_gating(logits.where(~padding[:, None], noise), **options)
        assert_same_routing(other_pads, routing)

        without_pads = top2_gating(logits[~padding], **options | {"padding": None})
        assert torch.equal(routing.expert_index[~padding], without_pads.expert_index)
        assert torch.equal(routing.position[~padding], without_pads.position)
        torch.testing.assert_close(routing.combine_weights[~padding], without_pads.combine_weights)

    @pytest.mark.parametrize("dtype", [torch.long, torch.int, torch.float])
    def test_a_mask_that_is_not_bool_is_refused_and_the_error_says_how_to_fix_it(self, tiny_config, dtype):
        attention_mask = torch.ones(1, 3, dtype=dtype)
        with pytest.raises(ValueError, match="attention_mask == 0"):
            Top2Router(tiny_config())(torch.zeros(1, 3, 8), attention_mask)
        with pytest.raises(ValueError, match="attention_mask == 0"):
            top2_gating(torch.zeros(3, 4), capacity=3, padding=attention_mask[0])

    @pytest.mark.parametrize("shape", [(3,), (3, 1), (1, 4), (1, 1, 3, 3)])
    def test_a_mask_of_another_shape_is_refused(self, tiny_config, shape):
        with pytest.raises(ValueError, match=r"must be \[1, 3\]"):
            Top2Router(tiny_config())(torch.zeros(1, 3, 8), torch.zeros(shape, dtype=torch.bool))

    def test_hugging_faces_flag_routes_padding_like_other_tokens(self, tiny_config):
        hidden = torch.randn(1, 4, 8, generator=seeded(0))
        mask = torch.tensor([[False, False, True, True]])
        router = Top2Router(tiny_config(router_ignore_padding_tokens=True))
        assert (router(hidden, mask).expert_index >= 0).all()
        assert router(hidden, mask).padding is None


class TestBatchPriority:
    def test_the_surest_token_queues_first(self):
        logits = torch.tensor([[1.0, 0.0], [3.0, 0.0], [2.0, 0.0]])
        routing = top2_gating(logits, capacity=2, batch_prioritized=True)
        assert routing.position[:, 0].tolist() == [2, 0, 1]
        assert routing.kept[:, 0].tolist() == [False, True, True]

    @given(gating_cases())
    def test_queues_run_by_descending_top_probability_stable_on_ties(self, case):
        logits, options = case
        routing = top2_gating(logits, **options | {"batch_prioritized": True})
        top = routing.probs.amax(1).tolist()
        for k in (0, 1):
            for e in range(routing.num_experts):
                tokens = (routing.expert_index[:, k] == e).nonzero()[:, 0].tolist()
                by_place = sorted(tokens, key=lambda t: routing.position[t, k].item())
                assert by_place == sorted(tokens, key=lambda t: (-top[t], t))


class TestEdges:
    def test_zero_tokens(self, tiny_config):
        routing = top2_gating(torch.zeros(0, 4), capacity=0)
        assert routing.expert_index.shape == routing.combine_weights.shape == (0, 2)
        assert routing.dispatch_mask().shape == (0, 4, 0)
        assert Top2Router(tiny_config())(torch.zeros(2, 0, 8)).num_tokens == 0

    def test_one_token(self):
        routing = top2_gating(torch.tensor([[0.0, math.log(3.0)]]), capacity=1)
        assert routing.expert_index.tolist() == [[1, 0]]
        torch.testing.assert_close(routing.combine_weights, torch.tensor([[0.75, 0.25]]))

    @pytest.mark.parametrize("before", [False, True])
    @pytest.mark.parametrize("policy", POLICIES)
    def test_one_expert_takes_each_token_once(self, before, policy):
        routing = top2_gating(
            torch.randn(5, 1, generator=seeded(0)),
            capacity=3,
            normalize_before_dropping=before,
            second_expert_policy=policy,
        )
        assert routing.expert_index.tolist() == [[0, -1]] * 5
        assert routing.combine_weights.tolist() == [[1.0, 0.0]] * 3 + [[0.0, 0.0]] * 2

    def test_a_survivor_whose_probability_underflows_keeps_its_full_gate(self):
        logits = torch.tensor([[0.0, -500.0, -600.0]]).repeat(2, 1)
        routing = top2_gating(logits, capacity=1)
        assert routing.probs[1, 1] == 0
        assert routing.kept.tolist() == [[True, True], [False, False]]
        # Expert 0 takes token 0 only: let token 1 survive with its second choice alone.
        logits[0] = torch.tensor([0.0, -700.0, -600.0])
        routing = top2_gating(logits, capacity=1)
        assert routing.kept.tolist() == [[True, True], [False, True]]
        assert routing.combine_weights[1].tolist() == [0.0, 1.0]

    @pytest.mark.parametrize("only", [0, 1, 2])
    def test_experts_ruled_out_with_minus_infinity(self, only):
        logits = torch.full((1, 3), -math.inf)
        logits[0, only] = 1.0
        routing = top2_gating(logits, capacity=1)
        assert routing.expert_index[0, 0] == only
        assert routing.expert_index[0, 1] != only
        assert routing.combine_weights.tolist() == [[1.0, 0.0]]

    @pytest.mark.parametrize(
        ("logits", "options", "message"),
        [
            (torch.zeros(3), {}, r"\[T, E\]"),
            (torch.zeros(3, 2, 1), {}, r"\[T, E\]"),
            (torch.zeros(3, 0), {}, r"\[T, E\]"),
            (torch.zeros(3, 2, dtype=torch.long), {}, "floating"),
            (torch.zeros(3, 2), {"capacity": -1}, "capacity"),
            (torch.zeros(3, 2), {"second_expert_policy": "best"}, "all, sampling or random"),
            (torch.zeros(3, 2), {"padding": torch.zeros(2, dtype=torch.bool)}, r"must be \[3\]"),
        ],
    )
    def test_wrong_arguments_are_value_errors(self, logits, options, message):
        with pytest.raises(ValueError, match=message):
            top2_gating(logits, **{"capacity": 1} | options)

    def test_hidden_of_another_width_is_refused(self, tiny_config):
        with pytest.raises(ValueError, match=r"\[B, S, 8\]"):
            Top2Router(tiny_config())(torch.zeros(2, 3, 7))


class TestPolicies:
    T = 20_000
    LOGITS = torch.tensor([0.5, 2.0, 1.0, -0.5, 0.0])

    def test_sampling_draws_the_runner_up_from_the_softmax_without_the_first_choice(self):
        routing = top2_gating(
            self.LOGITS.expand(self.T, -1),
            capacity=self.T,
            second_expert_policy="sampling",
            generator=seeded(0),
        )
        assert (routing.expert_index[:, 0] == 1).all()
        observed = count_per_expert(routing.expert_index[:, 1], 5).double()
        expected = self.T * torch.softmax(self.LOGITS.index_fill(0, torch.tensor(1), -torch.inf), 0)
        assert observed[1] == 0
        others = [0, 2, 3, 4]
        chi_square = ((observed - expected)[others] ** 2 / expected[others]).sum()
        assert chi_square < 16.27  # 99.9th percentile, 3 degrees of freedom

    def test_sampled_gates_come_from_the_clean_probabilities(self):
        routing = top2_gating(
            self.LOGITS.expand(50, -1), capacity=50, second_expert_policy="sampling", generator=seeded(0)
        )
        chosen = routing.probs.gather(1, routing.expert_index)
        torch.testing.assert_close(routing.combine_weights, chosen / chosen.sum(1, keepdim=True))
        torch.testing.assert_close(routing.probs, torch.softmax(routing.logits, 1))

    @pytest.mark.parametrize("p2", [0.02, 0.2, 0.45])
    def test_random_keeps_the_runner_up_with_twice_its_probability(self, p2):
        probs = torch.tensor([0.999 - p2, p2, 0.001])
        routing = top2_gating(
            probs.log().expand(self.T, -1),
            capacity=self.T,
            second_expert_policy="random",
            generator=seeded(0),
        )
        share = (routing.expert_index[:, 1] == 1).double().mean().item()
        expected = min(1.0, 2 * p2)
        assert share == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / self.T))

    def test_a_rejected_runner_up_takes_no_place_in_the_queue(self):
        probs = torch.tensor([0.89, 0.1, 0.01])
        routing = top2_gating(
            probs.log().expand(100, -1), capacity=100, second_expert_policy="random", generator=seeded(0)
        )
        second = routing.expert_index[:, 1]
        assert (routing.position[second == 1, 1] == torch.arange(int((second == 1).sum()))).all()

    def test_a_rejected_runner_up_loses_its_share_if_normalised_before(self):
        """As in GShard's algorithm 1 and fairseq's top2gate, g1 / (g1 + g2) is computed first."""
        probs = torch.tensor([0.8, 0.1, 0.1])
        options = {"capacity": 100, "second_expert_policy": "random", "normalize_before_dropping": True}
        routing = top2_gating(probs.log().expand(100, -1), generator=seeded(0), **options)
        rejected = routing.expert_index[:, 1] == -1
        assert 0 < rejected.sum() < 100
        torch.testing.assert_close(routing.combine_weights[:, 0], torch.full((100,), 8 / 9))

    @pytest.mark.parametrize("policy", ["sampling", "random"])
    def test_the_same_generator_repeats_and_the_global_one_is_left_alone(self, policy):
        logits = torch.randn(50, 6, generator=seeded(1))
        options = {"capacity": 50, "second_expert_policy": policy}
        before = torch.get_rng_state()
        once, again, other = (top2_gating(logits, generator=seeded(seed), **options) for seed in (3, 3, 4))
        assert torch.equal(once.expert_index, again.expert_index)
        assert not torch.equal(once.expert_index, other.expert_index)
        assert torch.equal(before, torch.get_rng_state())

    @pytest.mark.parametrize("policy", ["sampling", "random"])
    def test_eval_takes_the_runner_up_unless_asked_otherwise(self, tiny_config, policy):
        torch.manual_seed(0)
        config = tiny_config(second_expert_policy=policy)
        hidden = torch.randn(10, 10, 8)
        router = Top2Router(config).eval()
        runner_up = router(hidden).logits.topk(2).indices
        assert torch.equal(router(hidden).expert_index, runner_up)
        assert not torch.equal(router.train()(hidden).expert_index, runner_up)

        sampling_router = Top2Router(tiny_config(second_expert_policy=policy, sample_in_eval=True)).eval()
        sampling_router.load_state_dict(router.state_dict())
        assert not torch.equal(sampling_router(hidden).expert_index, runner_up)


class TestCapacity:
    @pytest.mark.parametrize(
        ("fields", "training", "expected"),
        [
            ({}, True, 6),  # 2 * ceil(10 / 4)
            ({}, False, 10),
            ({"moe_eval_capacity_token_fraction": 0.25}, False, 3),
            ({"moe_eval_capacity_token_fraction": 0.25}, True, 6),
            ({"moe_eval_capacity_token_fraction": -1.0}, False, 6),
            ({"moe_eval_capacity_token_fraction": 0.0}, False, 6),
            ({"expert_capacity": 2}, True, 2),
            ({"expert_capacity": 2}, False, 10),
            ({"expert_capacity": 2, "moe_eval_capacity_token_fraction": 0.0}, False, 2),
            ({"expert_capacity_factor": 0.5}, True, 3),
            ({"expert_capacity_factor": 1.25}, True, 8),
        ],
    )
    def test_rule(self, tiny_config, fields, training, expected):
        config = tiny_config(num_experts=4, **fields)
        assert expert_capacity(10, config, training) == expected
        router = Top2Router(config).train(training)
        assert router(torch.zeros(2, 5, 8)).capacity == expected

    def test_padding_counts_towards_capacity(self, tiny_config):
        mask = torch.tensor([[False] * 2 + [True] * 6])
        assert Top2Router(tiny_config())(torch.zeros(1, 8, 8), mask).capacity == 4


@given(st.lists(st.integers(-1, 5), max_size=20))
def test_count_per_expert_ignores_minus_one(choices):
    counts = count_per_expert(torch.tensor(choices, dtype=torch.long), 6)
    assert counts.tolist() == [choices.count(e) for e in range(6)]
