"""Losses compared with known values, closed forms, and loops."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_edu.moe.losses import (
    CrossEntropy,
    MoELoss,
    SpecialLossNormalizingFactor,
    moe_loss,
    weighted_cross_entropy,
)
from moe_edu.moe.metrics import ExpertMetrics
from moe_edu.moe.router_losses import load_balancing_loss, router_z_loss
from moe_edu.moe.routing import top2_gating

FACTORS = [None, 7.5, *SpecialLossNormalizingFactor]
# The batch of T5X's own test of its MoE loss (`t5x/contrib/moe/models_test.py`).
T5X_LOGITS = torch.arange(24.0).reshape(2, 4, 3)
T5X_TARGETS = torch.tensor([[1, 2, 1, 0], [0, 1, 0, 2]])
T5X_WEIGHTS = torch.tensor([[1, 1, 1, 0], [0, 1, 0, 1]])

quick = settings(max_examples=50, deadline=None)


def t5x_cross_entropy(logits, targets, weights, label_smoothing, z_loss, factor, segment_ids=None):
    """`weighted_cross_entropy` in its obvious form: explicit soft targets, and a loop over sequences."""
    V = logits.shape[-1]
    confidence, low = 1 - label_smoothing, label_smoothing / (V - 1)
    soft_targets = torch.full_like(logits, low).scatter(-1, targets[..., None], confidence)
    entropy = -(confidence * math.log(confidence) + (V - 1) * low * math.log(low + 1e-20))
    log_z = torch.logsumexp(logits, dim=-1)
    z_term = z_loss * log_z**2
    losses = -(soft_targets * (logits - log_z[..., None])).sum(-1) + z_term - entropy

    divisor = factor or 1.0
    if factor is SpecialLossNormalizingFactor.NUM_REAL_TARGET_TOKENS:
        divisor = weights.sum()
    elif factor is SpecialLossNormalizingFactor.NUM_TOTAL_TARGET_TOKENS:
        divisor = targets.numel()
    elif factor is SpecialLossNormalizingFactor.AVERAGE_PER_SEQUENCE:
        divisor, scaled = 0, torch.zeros_like(weights)
        for row in range(len(weights)):
            ids = torch.ones_like(targets[row]) if segment_ids is None else segment_ids[row]
            for segment in set(ids.tolist()) - {0}:
                inside = ids == segment
                if weights[row, inside].sum() > 0:
                    scaled[row, inside] = weights[row, inside] / weights[row, inside].sum()
                    divisor += 1
        weights = scaled
    if divisor == 0:
        return CrossEntropy(losses.sum() * 0, z_term.sum() * 0, weights.sum())
    return CrossEntropy((losses * weights / divisor).sum(), (z_term * weights / divisor).sum(), weights.sum())


def slow_load_balancing_loss(probs, expert_index, padding, choices):
    real = [t for t in range(len(probs)) if not padding[t]]
    if not real:
        return probs.sum() * 0
    total = torch.zeros((), dtype=probs.dtype)
    for e in range(probs.shape[1]):
        row_choices = [expert_index[t, :1] if choices == "first" else expert_index[t] for t in real]
        f = sum(int((chosen == e).sum()) for chosen in row_choices) / len(real)
        total = total + f * sum(probs[t, e] for t in real) / len(real)
    return total * probs.shape[1]


def slow_router_z_loss(logits, padding):
    real = [t for t in range(len(logits)) if not padding[t]]
    return sum((logits[t].exp().sum().log() ** 2 for t in real), logits.sum() * 0) / max(len(real), 1)


def layer(auxiliary_loss: float = 0.2, router_z: float = 0.1) -> ExpertMetrics:
    values = (auxiliary_loss, router_z, 0.1, 0.9, 0.5)
    return ExpertMetrics(*(torch.tensor(value, requires_grad=True) for value in values))


def gradient(value: Tensor, wrt: Tensor) -> Tensor:
    return torch.autograd.grad(value, wrt, retain_graph=True)[0]


@st.composite
def batches(draw):
    """logits [B, S, V] fp64, targets, weights with zeros, packed segment ids with padding at the end."""
    B, S, V = draw(st.integers(1, 3)), draw(st.integers(1, 6)), draw(st.integers(2, 7))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    logits = 3 * torch.randn(B, S, V, generator=generator, dtype=torch.float64)
    targets = torch.randint(V, (B, S), generator=generator)
    weights = torch.randint(3, (B, S), generator=generator).double() / 2
    starts = torch.randint(2, (B, S), generator=generator)
    segment_ids = 1 + starts.cumsum(-1)
    num_pads = torch.randint(S + 1, (B, 1), generator=generator)
    segment_ids[torch.arange(S) >= S - num_pads] = 0
    return logits.requires_grad_(), targets, weights, segment_ids


@st.composite
def routed_batches(draw):
    """logits [T, E] fp64, expert_index [T, 2] with some choices not made, padding [T]."""
    T, E = draw(st.integers(0, 12)), draw(st.integers(2, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    logits = 2 * torch.randn(T, E, generator=generator, dtype=torch.float64)
    expert_index = logits.topk(2).indices
    expert_index[torch.rand(T, generator=generator) < 0.3, 1] = -1
    padding = torch.rand(T, generator=generator) < draw(st.sampled_from([0.0, 0.4, 1.0]))
    expert_index[padding] = -1
    return logits.requires_grad_(), expert_index, padding


class TestWeightedCrossEntropy:
    @quick
    @given(batches(), st.sampled_from([0.0, 0.1, 0.9]), st.sampled_from([0.0, 0.3]), st.sampled_from(FACTORS))
    def test_agrees_with_the_loops(self, batch, label_smoothing, z_loss, factor):
        logits, targets, weights, segment_ids = batch
        for segments in (None, segment_ids):
            arguments = (logits, targets, weights, label_smoothing, z_loss, factor, segments)
            fast, slow = weighted_cross_entropy(*arguments), t5x_cross_entropy(*arguments)
            for ours, theirs in zip(fast, slow, strict=True):
                torch.testing.assert_close(ours, theirs)
            torch.testing.assert_close(gradient(fast.total, logits), gradient(slow.total, logits))

    @quick
    @given(batches(), st.sampled_from([0.05, 0.1, 0.4]))
    def test_agrees_with_torch_once_the_smoothing_is_converted(self, batch, label_smoothing):
        """PyTorch shares the mass among all V classes, T5X among the other V-1."""
        logits, targets, _, _ = batch
        V = logits.shape[-1]
        low = label_smoothing / (V - 1)
        entropy = -(1 - label_smoothing) * math.log(1 - label_smoothing) - label_smoothing * math.log(low)
        expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), label_smoothing=low * V) - entropy
        ours = weighted_cross_entropy(
            logits, targets, torch.ones_like(targets), label_smoothing, 0.0, "num_total_target_tokens"
        )
        torch.testing.assert_close(ours.total, expected)

    def test_t5x_known_value(self):
        result = weighted_cross_entropy(T5X_LOGITS, T5X_TARGETS, T5X_WEIGHTS)
        assert result.total.item() == pytest.approx(5.0380305, abs=1e-6)  # 5.0590305 minus the router terms
        assert result.weight_sum.item() == 5
        assert result.z_loss.item() == 0

    @pytest.mark.parametrize("V", [2, 5, 1000])
    def test_uniform_logits_give_log_v_and_its_square(self, V):
        targets = torch.tensor([[1, 1, 0]])
        result = weighted_cross_entropy(torch.zeros(1, 3, V), targets, z_loss=0.25)
        z = 2 * 0.25 * math.log(V) ** 2
        assert result.z_loss.item() == pytest.approx(z)
        assert result.total.item() == pytest.approx(2 * math.log(V) + z)

    @pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 0.5])
    def test_perfect_prediction_scores_zero(self, label_smoothing):
        V = 9
        targets = torch.randint(V, (2, 5), generator=torch.Generator().manual_seed(0))
        soft = torch.full((2, 5, V), label_smoothing / (V - 1), dtype=torch.float64)
        soft.scatter_(-1, targets[..., None], 1 - label_smoothing)
        logits = soft.log().requires_grad_()  # without smoothing, -inf everywhere except at the target
        total = weighted_cross_entropy(logits, targets, torch.ones(2, 5), label_smoothing).total
        assert total.item() == pytest.approx(0, abs=1e-12)
        assert gradient(total, logits).abs().max() < 1e-12

    def test_gradient_of_the_z_term(self):
        logits = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
        result = weighted_cross_entropy(logits, torch.ones(2, 3, dtype=torch.long), z_loss=0.7)
        log_z = logits.logsumexp(-1, keepdim=True)
        torch.testing.assert_close(gradient(result.z_loss, logits), 2 * 0.7 * log_z * logits.softmax(-1))

    def test_default_weights_are_the_targets_above_zero(self):
        default = weighted_cross_entropy(T5X_LOGITS, T5X_TARGETS, z_loss=0.1)
        explicit = weighted_cross_entropy(T5X_LOGITS, T5X_TARGETS, T5X_TARGETS > 0, z_loss=0.1)
        assert default == explicit
        assert default.weight_sum.item() == 5

    @pytest.mark.parametrize("factor", FACTORS)
    @pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
    def test_pads_have_no_influence_and_no_gradient(self, factor, label_smoothing):
        generator = torch.Generator().manual_seed(1)
        logits = torch.randn(2, 5, 7, generator=generator)
        targets = torch.tensor([[3, 1, 2, 0, 0], [4, 0, 0, 0, 0]])

        def value_and_gradient(padded_logits):
            padded_logits = padded_logits.clone().requires_grad_()
            total = weighted_cross_entropy(padded_logits, targets, None, label_smoothing, 0.01, factor).total
            return total.detach(), gradient(total, padded_logits)

        value, grad = value_and_gradient(logits)
        other = logits.masked_fill((targets == 0)[..., None], 123.0)
        other_value, other_grad = value_and_gradient(other)
        assert value == other_value
        assert torch.equal(grad, other_grad)
        assert not grad[targets == 0].any()
        assert grad[targets > 0].any()

    @pytest.mark.parametrize("factor", FACTORS)
    @pytest.mark.parametrize("shape", [(2, 3), (0, 3), (2, 0)])
    def test_no_real_token_gives_zero_and_no_nan(self, factor, shape):
        logits = torch.randn(*shape, 5, requires_grad=True)
        targets = torch.zeros(shape, dtype=torch.long)
        for segment_ids in (None, torch.zeros_like(targets)):
            result = weighted_cross_entropy(logits, targets, None, 0.1, 0.1, factor, segment_ids)
            assert [value.item() for value in result] == [0, 0, 0]
            assert not gradient(result.total, logits).any()

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_logits_are_summed_in_fp32(self, dtype):
        generator = torch.Generator().manual_seed(2)
        logits = (4 * torch.randn(4, 64, 300, generator=generator)).to(dtype).requires_grad_()
        targets = torch.randint(1, 300, (4, 64), generator=generator)
        half = weighted_cross_entropy(logits, targets, None, 0.1, 0.01)
        single = weighted_cross_entropy(logits.detach().float(), targets, None, 0.1, 0.01)
        assert half.total.dtype == torch.float32
        for ours, expected in zip(half, single, strict=True):
            torch.testing.assert_close(ours.detach(), expected)
        assert gradient(half.total, logits).isfinite().all()

    @pytest.mark.parametrize("offset", [-1e4, 1e4])
    def test_a_large_common_offset_changes_nothing(self, offset):
        logits = torch.tensor([[[1.0, -2.0, 3.0]]])
        targets = torch.tensor([[2]])
        plain, shifted = (
            weighted_cross_entropy(x, targets, None, 0.1).total for x in (logits, logits + offset)
        )
        torch.testing.assert_close(plain, shifted, atol=1e-6, rtol=0)

    def test_each_sequence_counts_the_same_under_average_per_sequence(self):
        """A sequence repeated within its own row keeps its mean; one without weights is not counted."""
        logits = torch.randn(3, 4, 5)
        targets = torch.tensor([[1, 2, 3, 4], [2, 0, 0, 0], [0, 0, 0, 0]])
        per_token = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(3, 4)
        result = weighted_cross_entropy(logits, targets, loss_normalizing_factor="AVERAGE_PER_SEQUENCE")
        torch.testing.assert_close(result.total, (per_token[0].mean() + per_token[1, 0]) / 2)
        assert result.weight_sum.item() == 2

    def test_packing_sequences_into_one_row_does_not_change_average_per_sequence(self):
        logits = torch.randn(2, 3, 5)
        targets = torch.tensor([[1, 2, 3], [4, 2, 0]])
        apart = weighted_cross_entropy(
            logits, targets, None, 0.1, 0.1, SpecialLossNormalizingFactor.AVERAGE_PER_SEQUENCE
        )
        packed = weighted_cross_entropy(
            logits.view(1, 6, 5),
            targets.view(1, 6),
            None,
            0.1,
            0.1,
            SpecialLossNormalizingFactor.AVERAGE_PER_SEQUENCE,
            segment_ids=torch.tensor([[1, 1, 1, 2, 2, 0]]),
        )
        for ours, expected in zip(packed, apart, strict=True):
            torch.testing.assert_close(ours, expected)

    @pytest.mark.parametrize("spell", [str.upper, str.lower, str.title])
    @pytest.mark.parametrize("factor", SpecialLossNormalizingFactor)
    def test_factors_have_names_in_any_case(self, factor, spell):
        arguments = (T5X_LOGITS, T5X_TARGETS, T5X_WEIGHTS, 0.1, 0.1)
        assert weighted_cross_entropy(*arguments, spell(factor.name)) == weighted_cross_entropy(
            *arguments, factor
        )

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"loss_normalizing_factor": "num_real_tokens"}, "NUM_REAL_TARGET_TOKENS.*'num_real_tokens'"),
            ({"loss_normalizing_factor": 0}, "above 0.*not 0"),
            ({"loss_normalizing_factor": -2.0}, "above 0"),
            ({"loss_normalizing_factor": math.nan}, "above 0"),
            ({"loss_normalizing_factor": math.inf}, "finite"),
            ({"loss_normalizing_factor": True}, "not True"),
            ({"label_smoothing": 1.0}, "label_smoothing.*below 1"),
            ({"label_smoothing": -0.1}, "label_smoothing"),
            ({"label_smoothing": math.nan}, "label_smoothing"),
            ({"z_loss": -1.0}, "z_loss"),
            ({"targets": T5X_TARGETS.float()}, "targets.*integer dtype"),
            ({"targets": T5X_TARGETS > 0}, "targets.*integer dtype"),
            ({"targets": T5X_TARGETS[:, :3]}, r"logits have \[2, 4, 3\] and targets \[2, 3\]"),
            ({"targets": T5X_LOGITS.long()}, "plus one dimension"),
            ({"weights": T5X_WEIGHTS[0]}, r"weights.*\[2, 4\], not \[4\]"),
            ({"segment_ids": T5X_WEIGHTS.T}, r"segment_ids.*\[2, 4\], not \[4, 2\]"),
            ({"logits": T5X_LOGITS[..., :1], "label_smoothing": 0.1}, "only one"),
        ],
    )
    def test_wrong_arguments_are_refused(self, changes, message):
        with pytest.raises(ValueError, match=message):
            weighted_cross_entropy(**({"logits": T5X_LOGITS, "targets": T5X_TARGETS} | changes))


class TestRouterLosses:
    @quick
    @given(routed_batches(), st.sampled_from(["first", "all"]))
    def test_load_balancing_loss_agrees_with_the_loops(self, batch, choices):
        logits, expert_index, padding = batch
        probs = logits.softmax(-1)
        fast = load_balancing_loss(probs, expert_index, padding, choices)
        slow = slow_load_balancing_loss(probs, expert_index, padding, choices)
        torch.testing.assert_close(fast, slow)
        torch.testing.assert_close(gradient(fast, logits), gradient(slow, logits))

    @quick
    @given(routed_batches())
    def test_router_z_loss_agrees_with_the_loops(self, batch):
        logits, _, padding = batch
        fast, slow = router_z_loss(logits, padding), slow_router_z_loss(logits, padding)
        torch.testing.assert_close(fast, slow)
        torch.testing.assert_close(gradient(fast, logits), gradient(slow, logits))

    @quick
    @given(routed_batches(), st.sampled_from(["first", "all"]))
    def test_padded_rows_equal_absent_rows_whatever_they_hold(self, batch, choices):
        logits, expert_index, padding = batch
        garbage = logits.detach().masked_fill(padding[:, None], math.inf).requires_grad_()
        probs = garbage.softmax(-1).nan_to_num(nan=9.0)
        expert_index = expert_index.masked_fill(padding[:, None], 0)  # even a recorded choice is not counted
        real = logits[~padding]
        torch.testing.assert_close(
            load_balancing_loss(probs, expert_index, padding, choices),
            load_balancing_loss(real.softmax(-1), expert_index[~padding], None, choices),
        )
        z_loss = router_z_loss(garbage, padding)
        torch.testing.assert_close(z_loss, router_z_loss(real))
        grad = gradient(z_loss, garbage)
        assert grad.isfinite().all()
        assert not grad[padding].any()

    @pytest.mark.parametrize("E", [2, 3, 8])
    def test_balance_is_one_when_even_and_e_when_collapsed(self, E):
        probs = torch.full((2 * E, E), 1 / E)
        first = torch.arange(2 * E) % E
        even = torch.stack([first, (first + 1) % E], dim=1)
        assert load_balancing_loss(probs, even).item() == pytest.approx(1)
        assert load_balancing_loss(probs, even, choices="all").item() == pytest.approx(2)
        one_expert = torch.zeros(2 * E, dtype=torch.long)
        collapsed = load_balancing_loss(F.one_hot(one_expert, E).float(), one_expert[:, None])
        assert collapsed.item() == pytest.approx(E)

    def test_balance_gradient_pushes_down_the_crowded_expert(self):
        """dL/dp[t, e] = E * f_e / T: counts have no gradient of their own."""
        probs = torch.full((4, 2), 0.5, requires_grad=True)
        loss = load_balancing_loss(probs, torch.tensor([[0], [0], [0], [1]]))
        torch.testing.assert_close(gradient(loss, probs), torch.tensor([[0.375, 0.125]]).expand(4, 2))

    @pytest.mark.parametrize("E", [1, 4, 128])
    def test_z_loss_of_uniform_logits(self, E):
        assert router_z_loss(torch.zeros(3, E)).item() == pytest.approx(math.log(E) ** 2)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_inputs_are_summed_in_fp32(self, dtype):
        """400 squared exceeds fp16's largest number, and a bf16 mean of 4096 rows would lose most of them."""
        logits = torch.full((4096, 2), 400.0, dtype=dtype, requires_grad=True)
        z_loss = router_z_loss(logits)
        assert z_loss.dtype == torch.float32
        assert z_loss.item() == pytest.approx((400 + math.log(2)) ** 2)
        assert gradient(z_loss, logits).isfinite().all()
        probs = torch.rand(4096, 2, generator=torch.Generator().manual_seed(4)).to(dtype)
        expert_index = (torch.arange(4096) % 3 % 2)[:, None]
        balance = load_balancing_loss(probs, expert_index)
        torch.testing.assert_close(balance, load_balancing_loss(probs.float(), expert_index))

    @pytest.mark.parametrize(
        "padding", [None, torch.zeros(0, dtype=torch.bool), torch.ones(3, dtype=torch.bool)]
    )
    def test_no_real_token_gives_zero_and_no_nan(self, padding):
        T = 0 if padding is None else len(padding)
        logits = torch.randn(T, 4, requires_grad=True)
        expert_index = torch.full((T, 2), -1)
        for loss in (
            load_balancing_loss(logits.softmax(-1), expert_index, padding),
            router_z_loss(logits, padding),
        ):
            assert loss.item() == 0
            assert not gradient(loss, logits).any()

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (lambda p, i: load_balancing_loss(p, i, choices="second"), "choices.*'second'"),
            (lambda p, i: load_balancing_loss(p[None], i), r"\[T, E\]"),
            (lambda p, i: load_balancing_loss(p, i[:3]), r"\[T, K\] with T=4"),
            (lambda p, i: load_balancing_loss(p, i[:, 0]), r"\[T, K\]"),
            (lambda p, i: load_balancing_loss(p, i.float()), "integers"),
            (lambda p, i: load_balancing_loss(p, i > 0), "integers"),
            (lambda p, i: load_balancing_loss(p, i, torch.zeros(4)), "padding must be bool"),
            (lambda p, i: load_balancing_loss(p, i, torch.zeros(2, 2, dtype=torch.bool)), r"must be \[4\]"),
            (lambda p, i: router_z_loss(p[0]), r"logits.*\[T, E\]"),
            (lambda p, i: router_z_loss(p, torch.ones(4, dtype=torch.long)), "padding must be bool"),
        ],
    )
    def test_wrong_arguments_are_refused(self, call, message):
        with pytest.raises(ValueError, match=message):
            call(torch.full((4, 3), 1 / 3), torch.zeros(4, 2, dtype=torch.long))


class TestMoELoss:
    def test_t5x_known_total(self):
        loss = moe_loss(
            T5X_LOGITS,
            T5X_TARGETS,
            T5X_WEIGHTS,
            expert_metrics=[layer()],
            router_aux_loss_coef=0.1,
            router_z_loss_coef=0.01,
        )
        assert loss.total.item() == pytest.approx(5.0590305, abs=1e-6)

    def test_t5x_known_router_terms(self):
        loss = moe_loss(
            T5X_LOGITS,
            T5X_TARGETS,
            expert_metrics=[layer(1.0, 0.0), layer(2.0, 1.0)],
            router_aux_loss_coef=0.1,
            router_z_loss_coef=10.0,
        )
        assert loss.weighted_load_balancing_loss.item() == pytest.approx(0.15)
        assert loss.weighted_router_z_loss.item() == pytest.approx(5.0)
        assert loss.load_balancing_loss.item() == pytest.approx(1.5)
        assert loss.router_z_loss.item() == pytest.approx(0.5)

    @pytest.mark.parametrize("factor", FACTORS)
    def test_total_is_the_sum_of_its_parts_and_router_terms_are_not_normalised(self, factor):
        plain = weighted_cross_entropy(T5X_LOGITS, T5X_TARGETS, T5X_WEIGHTS, 0.1, 0.2, factor)
        loss = moe_loss(
            T5X_LOGITS,
            T5X_TARGETS,
            T5X_WEIGHTS,
            expert_metrics=[layer(1.0, 3.0)],
            router_aux_loss_coef=0.5,
            router_z_loss_coef=0.25,
            label_smoothing=0.1,
            z_loss=0.2,
            loss_normalizing_factor=factor,
        )
        torch.testing.assert_close(loss.total, plain.total + 0.5 * 1.0 + 0.25 * 3.0)
        torch.testing.assert_close(loss.cross_entropy + loss.z_loss, plain.total)
        torch.testing.assert_close(
            loss.cross_entropy
            + loss.z_loss
            + loss.weighted_load_balancing_loss
            + loss.weighted_router_z_loss,
            loss.total,
        )
        assert loss.z_loss == plain.z_loss
        assert loss.weight_sum == plain.weight_sum

    @pytest.mark.parametrize(("aux", "router_z"), [(0.01, 0.0), (0.0, 0.001), (0.01, 0.001)])
    def test_router_losses_without_sparse_layers_are_refused(self, aux, router_z):
        with pytest.raises(ValueError, match=r"no sparse layer ran.*encoder_sparse_step"):
            moe_loss(
                T5X_LOGITS,
                T5X_TARGETS,
                expert_metrics=(),
                router_aux_loss_coef=aux,
                router_z_loss_coef=router_z,
            )

    def test_a_dense_model_without_router_losses_has_plain_cross_entropy(self):
        loss = moe_loss(T5X_LOGITS, T5X_TARGETS, expert_metrics=(), router_aux_loss_coef=0.0, z_loss=0.1)
        plain = weighted_cross_entropy(T5X_LOGITS, T5X_TARGETS, z_loss=0.1)
        assert loss.total == plain.total
        assert loss.load_balancing_loss.item() == loss.weighted_router_z_loss.item() == 0

    @pytest.mark.parametrize("name", ["router_aux_loss_coef", "router_z_loss_coef"])
    @pytest.mark.parametrize("value", [-0.1, math.nan, math.inf])
    def test_wrong_coefficients_are_refused(self, name, value):
        with pytest.raises(ValueError, match=f"{name} must be a finite number of at least 0"):
            moe_loss(T5X_LOGITS, T5X_TARGETS, expert_metrics=[layer()], **{name: value})

    def test_compiles_to_one_graph(self):
        """A graph without breaks contains no branch on data and no `.item()`."""

        def step(router_logits, logits, targets, padding, segment_ids):
            routing = top2_gating(router_logits, capacity=3, padding=padding)
            return moe_loss(
                logits,
                targets,
                expert_metrics=[ExpertMetrics.from_routing(routing)],
                router_z_loss_coef=0.1,
                label_smoothing=0.1,
                z_loss=0.1,
                loss_normalizing_factor="average_per_sequence",
                segment_ids=segment_ids,
            )

        padding = torch.tensor([False] * 6 + [True] * 2)
        arguments = (torch.randn(8, 4), T5X_LOGITS, T5X_TARGETS, padding, T5X_WEIGHTS)
        compiled: MoELoss = torch.compile(step, backend="eager", fullgraph=True)(*arguments)
        for ours, expected in zip(compiled, step(*arguments), strict=True):
            torch.testing.assert_close(ours, expected)
