"""Attention compared with its definition in float64, with compiled code and without."""

from contextlib import suppress

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from moe_edu.kernels import attention
from moe_edu.kernels.attention import scaled_dot_product_attention


def by_definition(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
    scores = query.double() @ key.double().mT / query.shape[3] ** 0.5
    if bias is not None:
        scores = scores + bias.double()
    return (scores.softmax(-1) @ value.double()).float()


def check(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> None:
    with torch.no_grad():
        mixed = scaled_dot_product_attention(query, key, value, bias)
    torch.testing.assert_close(mixed, by_definition(query, key, value, bias), atol=2e-6, rtol=1e-5)


def heads(B: int, tokens: int, H: int, D: int) -> Tensor:
    """`[B, H, tokens, D]` as a projection returns it: the heads of each token side by side in memory."""
    return torch.randn(B, tokens, H, D).transpose(1, 2)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    B=st.integers(0, 4),
    H=st.integers(1, 3),
    queries=st.integers(0, 10),
    keys=st.integers(1, 40),
    D=st.sampled_from([1, 3, 8, 13, 32, 64, 80]),
    masked=st.sampled_from(["nothing", "sentence", "token"]),
    seed=st.integers(0, 2**31),
)
def test_every_number_is_right(either_code, B, H, queries, keys, D, masked, seed):
    torch.manual_seed(seed)
    shape = {"nothing": None, "sentence": (B, 1, 1, keys), "token": (1, 1, queries, keys)}[masked]
    bias = None
    if shape is not None:
        bias = torch.zeros(shape).masked_fill(torch.rand(shape) < 0.4, torch.finfo(torch.float32).min)
    check(heads(B, queries, H, D), heads(B, keys, H, D), heads(B, keys, H, D).contiguous(), bias)


@pytest.mark.parametrize(("keys", "D"), [(1024, 32), (1025, 32), (20, 256), (20, 257)])
def test_sizes_at_the_limits_of_compiled_code(either_code, keys, D):
    check(heads(2, 1, 2, D), heads(2, keys, 2, D), heads(2, keys, 2, D))


def test_very_different_scores_select_one_value(either_code):
    query, key = (
        torch.full((1, 1, 1, 4), 100.0),
        torch.linspace(-9, 9, 12).view(1, 1, 12, 1).repeat(1, 1, 1, 4),
    )
    value = heads(1, 12, 1, 4)
    check(query, key, value)
    with torch.no_grad():
        assert torch.equal(scaled_dot_product_attention(query, key, value)[0, 0, 0], value[0, 0, -1])


def test_threads_change_nothing_in_compiled_code(compiled_code):
    """The results agree bit for bit."""
    tensors = heads(5, 2, 3, 16), heads(5, 9, 3, 16), heads(5, 9, 3, 16)
    with torch.no_grad():
        expected = scaled_dot_product_attention(*tensors)
        try:
            torch.set_num_threads(3)
            several = scaled_dot_product_attention(*tensors)
        finally:
            torch.set_num_threads(1)
    assert torch.equal(expected, several)


def test_gradients_flow(either_code):
    tensors = [heads(2, tokens, 2, 4).requires_grad_() for tokens in (1, 5, 5)]
    scaled_dot_product_attention(*tensors).sum().backward()
    assert all(tensor.grad is not None and tensor.grad.any() for tensor in (tensors[0], tensors[2]))


@pytest.mark.parametrize("shape", [None, (2, 1, 1, 5), (1, 1, 8, 5)])
def test_compiled_code_runs_where_it_can(monkeypatch, shape):
    called = []
    monkeypatch.setattr(attention, "can_be_compiled", lambda *tensors: True)
    monkeypatch.setattr(attention, "call", lambda *arguments: called.append(arguments[0]))
    bias = None if shape is None else torch.zeros(shape)
    tensors = heads(2, 8, 2, 16), heads(2, 5, 2, 16), heads(2, 5, 2, 16)
    with torch.no_grad():
        scaled_dot_product_attention(*tensors, bias)
    assert called == ["attention"]
    scaled_dot_product_attention(*tensors, bias)  # with gradients, PyTorch computes it
    with torch.no_grad():
        scaled_dot_product_attention(*tensors, bias, dropout=0.5)
    assert called == ["attention"]


@pytest.mark.parametrize(
    "wrong", ["width", "keys", "values", "bias", "heads", "dtype", "many", "none", "apart"]
)
def test_compiled_code_never_runs_where_it_cannot(monkeypatch, wrong):
    """It would read and write beyond the tensors' memory."""
    monkeypatch.setattr(attention, "call", lambda *arguments: pytest.fail("compiled code was called"))
    if wrong != "dtype":
        monkeypatch.setattr(attention, "can_be_compiled", lambda *tensors: True)
    query, key, value, bias = heads(2, 1, 2, 8), heads(2, 5, 2, 8), heads(2, 5, 2, 8), torch.zeros(2, 1, 1, 5)
    query, key, value, bias = {
        "width": (query[..., :4], key, value, bias),
        "keys": (query, key[:, :, :3], value, bias),
        "values": (query, key, value[..., :7], bias),
        "bias": (query, key, value, bias[..., :4]),
        "heads": (query, key[:, :1], value[:, :1], bias),
        "dtype": (query.double(), key.double(), value.double(), bias.double()),
        "many": (heads(2, 9, 2, 8), key, value, bias),
        "none": (query, key[:, :, :0], value[:, :, :0], bias[..., :0]),
        "apart": (query, key, heads(2, 5, 2, 16)[..., ::2], bias),
    }[wrong]
    with torch.no_grad(), suppress(RuntimeError):  # PyTorch says what is wrong
        scaled_dot_product_attention(query, key, value, bias)


def test_a_compiler_sees_one_operator(compiled_code):
    targets = []

    def remember(graph, _):
        targets.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    compiled = torch.compile(scaled_dot_product_attention, backend=remember, fullgraph=True)
    tensors = heads(2, 1, 2, 8), heads(2, 5, 2, 8), heads(2, 5, 2, 8)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*tensors), by_definition(*tensors, None))
    assert targets == [torch.ops.moe_edu.attention.default]


def test_a_flop_counter_sees_both_products(compiled_code):
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        scaled_dot_product_attention(heads(2, 3, 2, 8), heads(2, 5, 2, 8), heads(2, 5, 2, 8))
    assert counter.get_total_flops() == 2 * (2 * 2) * (2 * 3 * 5 * 8)


def test_vmap_works(either_code):
    tensors = [torch.stack([heads(2, n, 2, 8) for _ in range(3)]) for n in (1, 5, 5)]
    with torch.no_grad():
        mixed = torch.vmap(scaled_dot_product_attention)(*tensors)
        for actual, *one in zip(mixed, *tensors, strict=True):
            torch.testing.assert_close(actual, by_definition(*one, None))


def test_forward_derivatives_are_not_lost(either_code):
    """PyTorch computes forward derivatives, or says that it cannot."""
    query, key, value = heads(2, 1, 2, 8), heads(2, 5, 2, 8), heads(2, 5, 2, 8)
    bias = torch.zeros(2, 1, 1, 5)
    with torch.no_grad():
        with pytest.raises(NotImplementedError, match="forward AD"):
            torch.func.jvp(lambda q: scaled_dot_product_attention(q, key, value), (query,), (query,))
        with pytest.raises(NotImplementedError, match="forward AD"):
            torch.func.jvp(lambda b: scaled_dot_product_attention(query, key, value, b), (bias,), (bias,))


@pytest.mark.parametrize("width", [3, 8])
def test_values_may_have_another_width(either_code, width):
    check(heads(2, 1, 2, 8), heads(2, 5, 2, 8), heads(2, 5, 2, width))


def test_the_operator_keeps_pytorchs_rules(compiled_code):
    tensors = heads(2, 1, 2, 8), heads(2, 5, 2, 8), heads(2, 5, 2, 8)
    torch.library.opcheck(torch.ops.moe_edu.attention.default, (*tensors, None))
    torch.library.opcheck(torch.ops.moe_edu.attention.default, (*tensors, torch.zeros(2, 1, 1, 5)))


def test_a_traced_graph_of_other_sizes_computes_what_pytorch_does(compiled_code):
    """Only the operator checks the inputs of a traced graph: compiled code has room for 1,024 keys."""
    query = heads(2, 1, 2, 8)
    with torch.no_grad():
        graph = make_fx(lambda q, k, v: scaled_dot_product_attention(q, k, v))(
            query, heads(2, 5, 2, 8), heads(2, 5, 2, 8)
        )
        assert "moe_edu.attention" in graph.code
        for keys in (5, 1500):
            key, value = heads(2, keys, 2, 8), heads(2, keys, 2, 8)
            torch.testing.assert_close(graph(query, key, value), by_definition(query, key, value, None))
