"""Each back end, and the whole sparse layer, compared with the loops: outputs and every gradient."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_edu.config import MoEConfig
from moe_edu.kernels.gradient_memory import GradientPages
from moe_edu.moe.dispatch import permute, plan_dispatch, unpermute
from moe_edu.moe.experts import Experts, _grouped_mm, _loop, choose_backend
from moe_edu.moe.layer import SparseMLP
from moe_edu.moe.loops import loop_gating, loop_sparse_mlp
from moe_edu.moe.routing import RouterOutput, top2_gating

BACKENDS = ["loop", "grouped", "padded"]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}


def make_config(E: int, D: int, **fields) -> MoEConfig:
    """A layer of any width, even or odd: one attention head divides them all."""
    return MoEConfig(
        d_model=D,
        encoder_attention_heads=1,
        decoder_attention_heads=1,
        num_experts=E,
        init_std=0.5,
        **{"moe_token_dropout": 0.0} | fields,
    )


def make_experts(config: MoEConfig, ffn_dim: int, backend: str, generator: torch.Generator) -> Experts:
    experts = Experts(config, ffn_dim, backend).double()
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return experts


def run(hidden: torch.Tensor, routing: RouterOutput, experts: Experts) -> torch.Tensor:
    plan = plan_dispatch(routing)
    rows = experts(permute(hidden, plan), plan.counts, routing.capacity)
    return unpermute(rows, routing.combine_weights, plan)


def assert_close(actual, expected, tolerance=1e-10):
    """Compare relative to the tensor's largest element, as rounding in sums requires."""
    scale = max(1.0, expected.abs().max().item() if expected.numel() else 0.0)
    torch.testing.assert_close(actual.to(expected.dtype), expected, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("backend", BACKENDS)
class TestBackends:
    @settings(max_examples=25)
    @given(
        T=st.integers(0, 10),
        E=st.integers(1, 6),
        D=st.integers(1, 7),
        F=st.integers(1, 7),
        capacity=st.integers(0, 11),
        activation=st.sampled_from(["relu", "gelu", "silu"]),
        seed=st.integers(0, 2**31),
        expand=st.booleans(),
    )
    def test_equals_the_loop(self, backend, T, E, D, F, capacity, activation, seed, expand):
        """Empty experts, odd widths, drops, and the expanded gradient that `out.sum()` sends back."""
        generator = torch.Generator().manual_seed(seed)
        config = make_config(E, D, activation_function=activation)
        experts = make_experts(config, F, backend, generator)
        hidden = torch.randn(T, D, generator=generator, dtype=torch.float64, requires_grad=True)
        logits = torch.randn(T, E, generator=generator, dtype=torch.float64, requires_grad=True)
        leaves = [hidden, logits, *experts.parameters()]

        actual = run(hidden, top2_gating(logits, capacity=capacity), experts)
        expected = loop_sparse_mlp(hidden, loop_gating(logits, capacity=capacity), experts)
        assert_close(actual, expected)

        upstream = torch.ones(()) if expand else torch.randn(T, D, generator=generator, dtype=torch.float64)
        actual_grads, expected_grads = (
            # Adding zero times each leaf gives a zero gradient to the leaves that the loop never used.
            torch.autograd.grad((output * upstream).sum() + sum(0 * leaf.sum() for leaf in leaves), leaves)
            for output in (actual, expected)
        )
        for mine, reference in zip(actual_grads, expected_grads, strict=True):
            assert_close(mine, reference)

    def test_gradients_are_those_of_finite_differences(self, backend):
        generator = torch.Generator().manual_seed(0)
        experts = make_experts(make_config(3, 2, activation_function="silu"), 3, backend, generator)
        routing = top2_gating(torch.randn(4, 3, generator=generator, dtype=torch.float64), capacity=2)
        hidden = torch.randn(4, 2, generator=generator, dtype=torch.float64, requires_grad=True)
        parameters = dict(experts.named_parameters())

        def layer(hidden, *values):
            plan = plan_dispatch(routing)
            arguments = (permute(hidden, plan), plan.counts, routing.capacity)
            weights = dict(zip(parameters, values, strict=True))
            rows = torch.func.functional_call(experts, weights, arguments)
            return unpermute(rows, routing.combine_weights, plan)

        assert torch.autograd.gradcheck(layer, (hidden, *parameters.values()))

    def test_each_expert_that_is_routed_to_runs_and_learns(self, backend):
        """Release 5.x of `transformers` runs experts 0 and 1 only, whatever the router chose."""
        E, D = 6, 5
        generator = torch.Generator().manual_seed(0)
        experts = make_experts(make_config(E, D), 7, backend, generator)
        pairs = [(0, 1), (1, 2), (2, 4), (4, 5), (5, 0)]  # no token chooses expert 3
        hidden = torch.randn(len(pairs), D, generator=generator, dtype=torch.float64)
        logits = torch.zeros(len(pairs), E, dtype=torch.float64)
        for t, (first, second) in enumerate(pairs):
            logits[t, first], logits[t, second] = 2.0, 1.0
        run(hidden, top2_gating(logits, capacity=2), experts).square().sum().backward()
        for name, parameter in experts.named_parameters():
            assert [e for e in range(E) if parameter.grad[e].any()] == [0, 1, 2, 4, 5], name

    def test_non_contiguous_inputs_weights_and_gradients(self, backend):
        generator = torch.Generator().manual_seed(0)
        experts = make_experts(make_config(3, 5), 4, backend, generator)
        routing = top2_gating(torch.randn(6, 3, generator=generator, dtype=torch.float64), capacity=3)
        hidden = torch.randn(5, 6, generator=generator, dtype=torch.float64).T.requires_grad_()
        upstream = torch.randn(5, 6, generator=generator, dtype=torch.float64).T
        assert not hidden.is_contiguous()
        with torch.no_grad():
            for name in ("w1", "w2"):
                setattr(experts, name, torch.nn.Parameter(getattr(experts, name).mT.contiguous().mT))
        assert not experts.w1.is_contiguous()
        leaves = [hidden, *experts.parameters()]
        actual, expected = run(hidden, routing, experts), loop_sparse_mlp(hidden, routing, experts)
        assert_close(actual, expected)
        for mine, reference in zip(
            torch.autograd.grad(actual, leaves, upstream),
            torch.autograd.grad(expected, leaves, upstream),
            strict=True,
        ):
            assert_close(mine, reference)

    @pytest.mark.parametrize("frozen", ["hidden", "weights"])
    def test_frozen_parts_get_no_gradient(self, backend, frozen):
        experts = make_experts(make_config(3, 4), 5, backend, torch.Generator().manual_seed(0))
        experts.requires_grad_(frozen != "weights")
        hidden = torch.randn(4, 4, dtype=torch.float64, requires_grad=frozen != "hidden")
        routing = top2_gating(torch.randn(4, 3, dtype=torch.float64), capacity=4)
        run(hidden, routing, experts).sum().backward()
        assert (hidden.grad is None) == (frozen == "hidden")
        assert all((parameter.grad is None) == (frozen == "weights") for parameter in experts.parameters())

    def test_no_grad_gives_the_same_values(self, backend):
        experts = make_experts(make_config(4, 6), 5, backend, torch.Generator().manual_seed(0))
        hidden, logits = torch.randn(9, 6, dtype=torch.float64), torch.randn(9, 4, dtype=torch.float64)
        routing = top2_gating(logits, capacity=3)
        with torch.no_grad():
            without = run(hidden, routing, experts)
        assert_close(without, run(hidden, routing, experts))

    def test_autocast_multiplies_in_bf16_and_keeps_fp32_gradients(self, backend):
        torch.manual_seed(0)
        layer = SparseMLP(make_config(4, 8), 16, backend)
        hidden = torch.randn(2, 6, 8, requires_grad=True)
        leaves = [hidden, *layer.parameters()]
        with torch.autocast("cpu", torch.bfloat16):
            actual, routing = layer(hidden)
        expected = loop_sparse_mlp(hidden.flatten(0, 1), routing, layer.experts).view(hidden.shape)
        assert actual.dtype == torch.float32
        assert_close(actual, expected, TOLERANCE[torch.bfloat16])
        assert not torch.equal(actual, expected), "autocast had no effect"
        for mine, reference in zip(
            torch.autograd.grad(actual.sum(), leaves, retain_graph=True),
            torch.autograd.grad(expected.sum(), leaves),
            strict=True,
        ):
            assert mine.dtype == torch.float32
            assert_close(mine, reference, TOLERANCE[torch.bfloat16])

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_sparse_layer_equals_the_float64_loop(self, backend, dtype):
        """Both use the same routing, since near-ties may be decided differently in another precision."""
        check_layer(SparseMLP(make_config(5, 9, expert_capacity=3), 11, backend), dtype, "cpu")


def check_layer(layer: SparseMLP, dtype: torch.dtype, device: str) -> None:
    """Compare outputs and every gradient of `layer` in `dtype` with the loop over float64 copies."""
    torch.manual_seed(0)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    layer = layer.to(device, dtype)
    hidden = torch.randn(2, 7, layer.config.d_model, device=device, dtype=dtype, requires_grad=True)
    padding = torch.zeros(2, 7, dtype=torch.bool, device=device)
    padding[1, 5:] = True
    output, routing = layer(hidden, padding)
    assert output.dtype == dtype
    assert not routing.kept.all()

    slow = copy.deepcopy(layer).double()
    slow_hidden = hidden.detach().double().requires_grad_()
    logits = torch.nn.functional.linear(slow_hidden.flatten(0, 1), slow.router.classifier.weight)
    slow_routing = loop_gating(logits, capacity=routing.capacity, padding=padding.flatten())
    assert torch.equal(routing.expert_index, slow_routing.expert_index), "choose another seed: a near-tie"
    expected = loop_sparse_mlp(slow_hidden.flatten(0, 1), slow_routing, slow.experts).view(hidden.shape)
    assert_close(output.double(), expected, TOLERANCE[dtype])

    upstream = torch.randn(hidden.shape, device=device, dtype=dtype)
    actual = torch.autograd.grad((output * upstream).sum(), [hidden, *layer.parameters()])
    reference = torch.autograd.grad((expected * upstream.double()).sum(), [slow_hidden, *slow.parameters()])
    for mine, theirs in zip(actual, reference, strict=True):
        assert_close(mine.double(), theirs, TOLERANCE[dtype])


@pytest.mark.parametrize("backend", BACKENDS)
def test_activation_dropout_acts_in_training_only(backend):
    torch.manual_seed(0)
    experts = Experts(make_config(2, 4, activation_dropout=0.5), 64, backend)
    rows, counts = torch.randn(6, 4), torch.tensor([4, 2])
    assert torch.equal(experts.eval()(rows, counts, 6), experts(rows, counts, 6))
    assert not torch.equal(experts.train()(rows, counts, 6), experts(rows, counts, 6))


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_without_an_expert_have_finite_outputs_and_no_gradient(backend):
    """Rows after the last expert's belong to choices that were not kept."""
    experts = Experts(make_config(2, 4), 3, backend)
    rows = torch.randn(5, 4, requires_grad=True)
    outputs = experts(rows, torch.tensor([2, 1]), 2)
    assert outputs[3:].isfinite().all()
    (grad,) = torch.autograd.grad((outputs[:3] ** 2).sum(), rows)
    assert not grad[3:].any()
    assert grad[:3].any()


def test_auto_picks_a_back_end_that_exists():
    assert choose_backend(torch.device("cpu"), torch.float32, (3, 5, 4)) in BACKENDS
    layer = SparseMLP(make_config(3, 4), 5)
    assert layer.experts.backend == "auto"
    hidden = torch.randn(2, 5, 4)
    for backend in BACKENDS:
        other = SparseMLP(make_config(3, 4), 5, backend)
        other.load_state_dict(layer.state_dict())
        torch.testing.assert_close(other(hidden)[0], layer(hidden)[0])


@pytest.mark.parametrize("rows_at_once", [1, 2, 3, 5, 14])
def test_inference_in_portions_gives_the_same(rows_at_once, monkeypatch):
    """This holds whether an expert's rows are cut or several experts share a portion."""
    monkeypatch.setattr("moe_edu.moe.experts._ROWS_AT_ONCE", rows_at_once)
    experts = Experts(make_config(5, 4), 6, "grouped").double()
    rows = torch.randn(15, 4, dtype=torch.float64)
    counts = torch.tensor([0, 7, 1, 0, 6])
    with torch.no_grad():
        actual = experts(rows, counts, 7)
    weights = [experts.w1, experts.b1, experts.w2, experts.b2]
    assert_close(actual, _loop(rows, counts, torch.relu, weights))
    assert not actual[14].any()


class TestLargeGradients:
    """Gradients of 32 MiB and more use memory that is kept from step to step."""

    @pytest.fixture(autouse=True)
    def every_size_is_large(self, monkeypatch):
        monkeypatch.setattr("moe_edu.kernels.gradient_memory._LARGE_BYTES", 0)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_equal_the_float64_loop(self, dtype):
        check_layer(SparseMLP(make_config(5, 9, expert_capacity=3), 11, "grouped"), dtype, "cpu")

    def test_every_step_has_its_own_gradient(self):
        """Freed, accumulated and kept gradients equal those of the plain loop, step after step."""
        layers = [SparseMLP(make_config(5, 9), 11, backend) for backend in ("grouped", "loop")]
        layers[1].load_state_dict(layers[0].state_dict())
        generator, kept = torch.Generator().manual_seed(0), []
        for step in range(6):
            hidden = torch.randn(2, 7, 9, generator=generator)
            for layer in layers:
                if step % 3 == 0:
                    layer.zero_grad(set_to_none=True)
                layer(hidden)[0].square().sum().backward()
            grads = [[parameter.grad for parameter in layer.experts.parameters()] for layer in layers]
            kept += [(grads[0][0], grads[0][0].clone())] if step == 2 else []
            for actual, expected in zip(*grads, strict=True):
                torch.testing.assert_close(actual, expected)
        for gradient, copy_of_it in kept:
            assert torch.equal(gradient, copy_of_it)

    def test_a_gradient_is_taken_over_without_a_copy(self, monkeypatch):
        """Otherwise the memory would be written twice."""
        made = []

        def remember(pages, weight, make=GradientPages.empty_like):
            made.append(make(pages, weight))
            return made[-1].view(weight.shape)

        monkeypatch.setattr(GradientPages, "empty_like", remember)
        layer = SparseMLP(make_config(5, 9), 11, "grouped")
        layer(torch.randn(2, 7, 9))[0].sum().backward()
        assert {layer.experts.w1.grad.data_ptr(), layer.experts.w2.grad.data_ptr()} == {
            t.data_ptr() for t in made
        }

    def test_a_layer_that_trained_can_be_copied_and_pickled(self):
        layer = SparseMLP(make_config(5, 9), 11, "grouped")
        hidden = torch.randn(2, 7, 9)
        layer(hidden)[0].sum().backward()
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert torch.equal(other(hidden)[0], layer(hidden)[0])
            assert other.experts.pages is not layer.experts.pages


@pytest.mark.gpu
@pytest.mark.parametrize("widths", [(16, 24), (16, 11), (9, 24)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
def test_cuda_sparse_layer_equals_the_float64_loop(backend, dtype, widths, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    d_model, ffn_dim = widths
    check_layer(SparseMLP(make_config(5, d_model, expert_capacity=3), ffn_dim, backend), dtype, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("backend", ["padded", "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_forward_does_not_synchronise(dtype, backend, training):
    config = make_config(5, 16, moe_token_dropout=0.2, second_expert_policy="sampling")
    layer = SparseMLP(config, 24, backend).to("cuda", dtype).train(training)
    hidden = torch.randn(2, 7, 16, device="cuda", dtype=dtype)
    padding = torch.zeros(2, 7, dtype=torch.bool, device="cuda")
    layer(hidden, padding)  # set-up of libraries may synchronise once
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(hidden, padding)
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def test_cuda_grouped_form_equals_the_loop_for_rows_without_an_expert():
    """Its maths, run on the CPU: rows after the last expert's affect neither the output nor any gradient."""
    generator = torch.Generator().manual_seed(0)
    experts = make_experts(make_config(E=3, D=8), 16, "loop", generator).float()
    counts = torch.tensor([2, 0, 3])
    weights = [experts.w1, experts.b1, experts.w2, experts.b2]
    outcomes = []
    for form in (_loop, _grouped_mm):
        rows = torch.randn(8, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
        out = form(rows, counts, torch.relu, weights)
        outcomes.append([out, *torch.autograd.grad(out.square().sum(), [rows, *weights])])
    for expected, actual in zip(*outcomes, strict=True):
        assert_close(actual, expected, tolerance=1e-5)
    assert outcomes[1][1][5:].abs().max() == 0
