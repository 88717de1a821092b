"""The compiled products and PyTorch's, compared exactly: sums of whole numbers have no rounding."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from moe_edu.kernels import grouped_gemm


@pytest.fixture
def many_rows(monkeypatch):
    """Run compiled products even for more rows than they are faster for."""
    monkeypatch.setattr(grouped_gemm, "_FEW_ROWS", 1000)


@pytest.fixture
def products(either_code, many_rows):
    """Compiled code and PyTorch's, in turn."""


def whole(*shape: int) -> torch.Tensor:
    """Random whole numbers, so small that fp32 represents every sum of their products exactly."""
    return torch.randint(-8, 9, shape).float()


def make_problem(sizes: list[int], nobody: int, inputs: int, outputs: int):
    rows = sum(sizes) + nobody
    return (
        whole(rows, inputs),
        whole(len(sizes), outputs, inputs),
        whole(len(sizes), outputs),
        whole(rows, outputs),
    )


def check(sizes: list[int], nobody: int, inputs: int, outputs: int) -> None:
    """Compare all four functions with one product per expert in float64."""
    x, weight, bias, grad_y = make_problem(sizes, nobody, inputs, outputs)
    y = grouped_gemm.linear(x, weight, bias, sizes)
    grad_x = grouped_gemm.grad_input(grad_y, weight, sizes)
    grad_weight = grouped_gemm.grad_weight(grad_y, x, sizes, out=torch.full_like(weight, torch.nan))
    grad_bias = grouped_gemm.grad_bias(grad_y, sizes)
    parts = zip(sizes, x[: sum(sizes)].split(sizes), grad_y[: sum(sizes)].split(sizes), strict=True)
    start = 0
    for expert, (size, rows, grad) in enumerate(parts):
        own = slice(start, start + size)
        start += size
        w = weight[expert].double()
        assert torch.equal(y[own].double(), rows.double() @ w.T + bias[expert])
        assert torch.equal(grad_x[own].double(), grad.double() @ w)
        assert torch.equal(grad_weight[expert].double(), grad.double().T @ rows.double())
        assert torch.equal(grad_bias[expert].double(), grad.double().sum(0))
    assert not y[start:].any()
    assert not grad_x[start:].any()


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=5),
    nobody=st.integers(0, 3),
    inputs=st.integers(1, 70),
    outputs=st.integers(1, 70),
    seed=st.integers(0, 2**31),
)
def test_every_number_is_right(products, sizes, nobody, inputs, outputs, seed):
    torch.manual_seed(seed)
    check(sizes, nobody, inputs, outputs)


@pytest.mark.parametrize(
    ("sizes", "inputs", "outputs"),
    [
        ([1, 0, 129, 300], 33, 47),  # more rows than one task computes
        ([3, 20], 1100, 40),  # more inputs
        ([3, 20], 40, 1100),  # more outputs
        ([5, 140], 530, 2060),  # wide enough for several tasks in each direction
        ([2, 7], 2050, 515),
    ],
)
def test_every_number_of_large_problems_is_right(products, sizes, inputs, outputs):
    check(sizes, 2, inputs, outputs)


def rounding_bound(terms: int, magnitude: torch.Tensor) -> torch.Tensor:
    """How far an fp32 sum of `terms` products may be from the exact sum, for any order of additions.

    `magnitude` is the sum of the products' absolute values. Source: Higham 2002, "Accuracy and Stability of Numerical
    Algorithms", section 3.1: gamma_n = n u / (1 - n u), one rounding for each product and each addition.
    """
    n_u = (terms + 1) * torch.finfo(torch.float32).eps / 2
    return n_u / (1 - n_u) * magnitude


def all_products(x, weight, bias, grad_y, sizes):
    return (
        grouped_gemm.linear(x, weight, bias, sizes),
        grouped_gemm.grad_input(grad_y, weight, sizes),
        grouped_gemm.grad_weight(grad_y, x, sizes, out=torch.empty_like(weight)),
    )


@pytest.mark.parametrize("threads", [1, 3])
def test_sums_differ_from_the_exact_ones_by_rounding_alone(products, threads):
    """Libraries choose the order of additions, by the processor and the number of threads."""
    sizes = [9, 0, 150, 64]
    problem = [torch.randn_like(t) for t in make_problem(sizes, 1, 520, 600)]
    exact = all_products(*(t.double() for t in problem), sizes)
    magnitude = all_products(*(t.double().abs() for t in problem), sizes)
    torch.set_num_threads(threads)
    try:
        actual = all_products(*problem, sizes)
    finally:
        torch.set_num_threads(1)
    for terms, *outcome in zip((520 + 1, 600, max(sizes)), actual, exact, magnitude, strict=True):
        mine, true, size = outcome
        assert ((mine.double() - true).abs() <= rounding_bound(terms, size)).all()


def test_threads_change_nothing_in_compiled_code(compiled_code, many_rows):
    """The results agree bit for bit: the order of each sum is fixed."""
    sizes = [9, 0, 150, 64]
    problem = [torch.randn_like(t) for t in make_problem(sizes, 1, 520, 600)]
    one = all_products(*problem, sizes)
    torch.set_num_threads(3)
    try:
        several = all_products(*problem, sizes)
    finally:
        torch.set_num_threads(1)
    assert all(map(torch.equal, one, several))


def test_pytorch_computes_rows_that_are_not_contiguous(products):
    sizes = [2, 3]
    x, weight, bias, grad_y = make_problem(sizes, 0, 6, 4)
    expected = grouped_gemm.linear(x, weight, bias, sizes)
    assert torch.equal(grouped_gemm.linear(x.T.contiguous().T, weight, bias, sizes), expected)
    assert torch.equal(grouped_gemm.linear(x, weight.mT.contiguous().mT, bias, sizes), expected)
    expected = grouped_gemm.grad_input(grad_y, weight, sizes)
    assert torch.equal(grouped_gemm.grad_input(grad_y.T.contiguous().T, weight, sizes), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_pytorch_computes_other_dtypes(dtype):
    sizes = [2, 3]
    x, weight, bias, grad_y = (t.clamp(-2, 2).to(dtype) for t in make_problem(sizes, 0, 6, 4))
    assert torch.equal(grouped_gemm.linear(x, weight, bias, sizes)[:2], x[:2] @ weight[0].T + bias[0])
    assert torch.equal(grouped_gemm.grad_input(grad_y, weight, sizes)[2:], grad_y[2:] @ weight[1])


def test_compiled_code_runs_where_it_can(monkeypatch):
    called = []
    monkeypatch.setattr(grouped_gemm, "can_be_compiled", lambda *tensors: True)
    monkeypatch.setattr(grouped_gemm, "call", lambda *arguments: called.append(arguments[0]))
    x, weight, bias, grad_y = make_problem([2, 0, 3], 1, 6, 4)
    grouped_gemm.linear(x, weight, bias, [2, 0, 3])
    grouped_gemm.grad_input(grad_y, weight, [2, 0, 3])
    grouped_gemm.grad_weight(grad_y, x, [2, 0, 3], out=torch.empty_like(weight))
    assert called == [f"grouped_gemm_{product}" for product in ("linear", "grad_input", "grad_weight")]


def test_compiled_code_never_runs_where_it_cannot(monkeypatch):
    """It would read and write beyond the tensors' memory."""
    monkeypatch.setattr(grouped_gemm, "can_be_compiled", lambda *tensors: True)
    monkeypatch.setattr(grouped_gemm, "call", lambda *arguments: pytest.fail("compiled code was called"))
    x, weight, bias, grad_y = make_problem([2, 3], 0, 6, 4)
    with pytest.raises(RuntimeError, match="shape"):
        grouped_gemm.linear(x[:, :5].contiguous(), weight, bias, [2, 3])
    with pytest.raises(RuntimeError):
        grouped_gemm.linear(x, weight, bias[:, :3].contiguous(), [2, 3])
    with pytest.raises(IndexError):
        grouped_gemm.linear(x, weight, bias, [2, 2, 1])
    with pytest.raises(RuntimeError, match="shape"):
        grouped_gemm.grad_input(grad_y[:, :3].contiguous(), weight, [2, 3])
    grouped_gemm.linear(x[:4], weight, bias, [2, 3])  # a row is missing: PyTorch computes the others


class TestModesSeeEveryProduct:
    SIZES = (2, 3)

    def run(self):
        x, weight, bias, grad_y = make_problem(list(self.SIZES), 0, 6, 4)
        return (
            grouped_gemm.linear(x, weight, bias, self.SIZES),
            grouped_gemm.grad_input(grad_y, weight, self.SIZES),
            grouped_gemm.grad_weight(grad_y, x, self.SIZES, out=torch.empty_like(weight)),
        )

    def test_that_counts_flops(self, products):
        with FlopCounterMode(display=False) as counter:
            self.run()
        assert counter.get_total_flops() == 3 * 2 * sum(self.SIZES) * 6 * 4

    def test_that_has_no_memory(self, products):
        with FakeTensorMode():
            assert [tuple(t.shape) for t in self.run()] == [(5, 4), (5, 6), (2, 4, 6)]

    def test_that_follows_operators(self, products):
        class Follow(TorchDispatchMode):
            names = []  # noqa: RUF012

            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                self.names.append(str(function))
                return function(*args, **(kwargs or {}))

        with Follow():
            self.run()
        ours = [name for name in Follow.names if name.startswith("moe_edu.")]
        assert ours == [
            f"moe_edu.grouped_{product}.default" for product in ("linear", "grad_input", "grad_weight")
        ]

    def test_that_compiles(self, products):
        x, weight, bias, _ = make_problem(list(self.SIZES), 1, 6, 4)
        expected = grouped_gemm.linear(x, weight, bias, self.SIZES)
        compiled = torch.compile(grouped_gemm.linear, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(x, weight, bias, self.SIZES), expected)

    def test_that_differentiates_forward(self, products):
        """No derivative is silently lost."""
        x, weight, bias, _ = make_problem(list(self.SIZES), 0, 6, 4)
        with pytest.raises(NotImplementedError, match="forward AD"):
            torch.func.jvp(lambda x: grouped_gemm.linear(x, weight, bias, self.SIZES), (x,), (x,))

    def test_that_maps_over_an_axis(self, products):
        x, weight, bias, _ = make_problem(list(self.SIZES), 0, 6, 4)
        with pytest.raises(RuntimeError, match="Batching rule not implemented for moe_edu::grouped_linear"):
            torch.vmap(lambda x: grouped_gemm.linear(x, weight, bias, self.SIZES))(x[None])


def test_the_operators_keep_pytorchs_rules(products):
    x, weight, bias, grad_y = make_problem([2, 3], 1, 6, 4)
    operators = torch.ops.moe_edu
    torch.library.opcheck(operators.grouped_linear.default, (x, weight, bias, [2, 3], torch.zeros(6, 4)))
    torch.library.opcheck(operators.grouped_grad_input.default, (grad_y, weight, [2, 3], torch.zeros(6, 6)))
    torch.library.opcheck(operators.grouped_grad_weight.default, (grad_y, x, [2, 3], torch.zeros(2, 4, 6)))


def test_a_traced_graph_of_fewer_rows_stays_within_them(products):
    """Only the operator checks the inputs of a traced graph."""
    x, weight, bias, _ = make_problem([2, 3], 0, 6, 4)
    graph = make_fx(lambda x: grouped_gemm.linear(x, weight, bias, [2, 3], out=torch.zeros(5, 4)))(x)
    assert torch.equal(graph(x), grouped_gemm.linear(x, weight, bias, [2, 3]))
    with pytest.raises(RuntimeError):
        graph(x[:, :5].contiguous())


def test_pytorch_computes_the_backward_pass_of_many_rows(monkeypatch):
    asked = []
    monkeypatch.setattr(grouped_gemm, "can_be_compiled", lambda *tensors: bool(asked.append(tensors)))
    for sizes, times in (([256, 0, 256], 2), ([257, 0, 256], 0)):
        asked.clear()
        x, weight, _, grad_y = make_problem(sizes, 9, 2, 3)
        grouped_gemm.grad_input(grad_y, weight, sizes)
        grouped_gemm.grad_weight(grad_y, x, sizes, out=torch.empty_like(weight))
        assert len(asked) == times
