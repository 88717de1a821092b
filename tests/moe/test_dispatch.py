"""Dispatch and combine: the documented layout, inverse permutations, and GShard's dense form."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_edu.moe.dispatch import dense_combine, dense_dispatch, permute, plan_dispatch, unpermute
from moe_edu.moe.routing import top2_gating


@st.composite
def routed_tokens(draw):
    """Routing of T tokens with dropped choices and padding, and hidden states `[T, D]` in float64."""
    T, E, D = draw(st.integers(0, 12)), draw(st.integers(1, 6)), draw(st.integers(1, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    logits = torch.randn(T, E, generator=generator, dtype=torch.float64)
    padding = torch.rand(T, generator=generator) < draw(st.sampled_from([0.0, 0.4, 1.0]))
    routing = top2_gating(logits, capacity=draw(st.integers(0, T + 1)), padding=padding)
    return routing, torch.randn(T, D, generator=generator, dtype=torch.float64)


def test_layout_of_a_small_example():
    """Two tokens, two experts, and both second choices dropped."""
    routing = top2_gating(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), capacity=1)
    assert routing.expert_index.tolist() == [[1, 0], [0, 1]]
    assert routing.kept.tolist() == [[True, False], [True, False]]
    plan = plan_dispatch(routing)
    assert plan.counts.tolist() == [1, 1]
    assert plan.order[:2].tolist() == [2, 0]  # expert 0: t1's first choice; expert 1: t0's first choice
    hidden = torch.tensor([[10.0], [20.0]])
    assert permute(hidden, plan)[:2].tolist() == [[20.0], [10.0]]


@given(routed_tokens())
def test_rows_are_sorted_by_expert_and_token(case):
    routing, _ = case
    plan = plan_dispatch(routing)
    K, start = plan.choices, 0
    for e, count in enumerate(plan.counts.tolist()):
        tokens = []
        for flat in plan.order[start : start + count].tolist():
            t, k = divmod(flat, K)
            assert routing.expert_index[t, k] == e
            assert routing.kept[t, k]
            tokens.append(t)
        assert tokens == sorted(tokens)
        start += count
    assert start == routing.kept.sum()


@given(routed_tokens())
def test_row_is_the_inverse_of_order(case):
    routing, _ = case
    plan = plan_dispatch(routing)
    N = routing.kept.numel()
    assert torch.equal(plan.order[plan.row], torch.arange(N))
    assert torch.equal(plan.row[plan.order], torch.arange(N))


@given(routed_tokens())
def test_there_and_back_multiplies_by_the_sum_of_gates(case):
    routing, hidden = case
    plan = plan_dispatch(routing)
    back = unpermute(permute(hidden, plan), routing.combine_weights, plan)
    torch.testing.assert_close(back, hidden * routing.combine_weights.sum(1, keepdim=True))


@given(routed_tokens())
def test_equals_the_dense_form(case):
    """Each expert multiplies by a different number, which reveals a row at the wrong expert."""
    routing, hidden = case
    E = routing.num_experts
    factor = torch.arange(1.0, E + 1, dtype=hidden.dtype)

    mask = routing.dispatch_mask()
    slots = dense_dispatch(hidden, mask)
    assert slots.shape == (E, routing.capacity, hidden.shape[1])
    expected = dense_combine(slots * factor[:, None, None], mask, routing.combine_matrix())

    plan = plan_dispatch(routing)
    rows = permute(hidden, plan)
    kept_rows = int(plan.counts.sum())
    rows[:kept_rows] *= factor.repeat_interleave(plan.counts)[:, None]
    torch.testing.assert_close(unpermute(rows, routing.combine_weights, plan), expected)


@given(routed_tokens())
def test_gradients_equal_those_of_the_dense_form(case):
    routing, hidden = case
    upstream = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0), dtype=hidden.dtype)
    mask, plan = routing.dispatch_mask(), plan_dispatch(routing)

    def sparse(hidden, weights):
        return unpermute(permute(hidden, plan), weights, plan)

    def dense(hidden, weights):
        matrix = torch.zeros_like(routing.probs).scatter_add(1, routing.expert_index.clamp(min=0), weights)
        return dense_combine(dense_dispatch(hidden, mask), mask, matrix)

    gradients = []
    for form in (sparse, dense):
        h, w = hidden.clone().requires_grad_(), routing.combine_weights.clone().requires_grad_()
        # The gates of choices that were not kept are always zero, so their gradient does not matter.
        gradients.append(torch.autograd.grad((form(h, w * routing.kept) * upstream).sum(), (h, w)))
    torch.testing.assert_close(*gradients)


def test_unpermute_mixes_in_the_dtype_of_the_rows():
    routing = top2_gating(torch.randn(3, 4), capacity=3)
    plan = plan_dispatch(routing)
    rows = torch.ones(6, 2, dtype=torch.bfloat16)
    assert unpermute(rows, routing.combine_weights, plan).dtype == torch.bfloat16
