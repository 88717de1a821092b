"""The most probable tokens, compared with a softmax of all logits in float64."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from moe_edu.kernels import vocabulary
from moe_edu.kernels.vocabulary import most_probable


def check(hidden: torch.Tensor, weight: torch.Tensor, k: int) -> None:
    """Inputs are whole numbers, whose products have no rounding; among equal logits, the first counts as larger."""
    found = most_probable(hidden, weight, k)
    probabilities = (hidden.double() @ weight.double().T).log_softmax(-1)
    expected, order = probabilities.sort(dim=1, descending=True, stable=True)
    torch.testing.assert_close(found.log_probs, expected[:, :k].float(), atol=2e-6, rtol=1e-6)
    torch.testing.assert_close(
        found.log_probs, probabilities.gather(1, found.tokens).float(), atol=2e-6, rtol=1e-6
    )
    assert all(len(set(row)) == k for row in found.tokens.tolist())
    if vocabulary._can_be_compiled(hidden, weight, k):
        assert torch.equal(found.tokens, order[:, :k])


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(0, 70),
    width=st.integers(1, 20),
    size=st.integers(1, 1100),
    k=st.integers(1, 12),
    spread=st.integers(1, 4),
    seed=st.integers(0, 2**31),
)
def test_are_those_of_the_softmax_of_all_logits(either_code, rows, width, size, k, spread, seed):
    torch.manual_seed(seed)
    hidden, weight = (
        torch.randint(-spread, spread + 1, shape).float() for shape in ((rows, width), (size, width))
    )
    check(hidden, weight, min(k, size))


@pytest.mark.parametrize("largest", [1e-3, 80.0, 1e4])
def test_logits_of_any_size_give_probabilities(either_code, largest):
    """If the logits are large, all probabilities but one vanish."""
    weight = torch.linspace(-largest, largest, 600)[torch.randperm(600)][:, None]
    for hidden in (torch.ones(3, 1), -torch.ones(3, 1)):
        check(hidden, weight, 5)


def test_threads_change_nothing_in_compiled_code(compiled_code):
    """The results agree bit for bit."""
    hidden, weight = torch.randn(150, 40), torch.randn(700, 40)
    expected = most_probable(hidden, weight, 8)
    try:
        torch.set_num_threads(3)
        several = most_probable(hidden, weight, 8)
    finally:
        torch.set_num_threads(1)
    assert torch.equal(expected.tokens, several.tokens)
    assert torch.equal(expected.log_probs, several.log_probs)


def test_a_broken_model_still_chooses_existing_tokens(either_code):
    hidden, weight = torch.full((2, 4), torch.nan), torch.randn(50, 4)
    found = most_probable(hidden, weight, 3)
    assert found.log_probs.isnan().all()
    assert ((found.tokens >= 0) & (found.tokens < 50)).all()


def test_rows_need_not_be_contiguous(either_code):
    hidden, weight = torch.randint(-2, 3, (6, 5)).float().T, torch.randint(-2, 3, (40, 6)).float()
    check(hidden, weight, 4)
    check(hidden, weight.T.contiguous().T, 4)


def test_autocast_computes_the_logits_in_its_dtype(either_code):
    hidden, weight = torch.randn(5, 16), torch.randn(30, 16)
    with torch.autocast("cpu", torch.bfloat16):
        found = most_probable(hidden, weight, 3)
    expected = (hidden.bfloat16() @ weight.bfloat16().T).float().log_softmax(-1).topk(3)
    assert torch.equal(found.log_probs, expected.values)


def test_a_default_device_changes_nothing(either_code):
    """Otherwise compiled code would write to an address in a GPU's memory."""
    hidden, weight = torch.randn(5, 16), torch.randn(30, 16)
    with torch.device("meta"):
        found = most_probable(hidden, weight, 3)
    assert found.tokens.device.type == "cpu"
    assert torch.equal(found.tokens, (hidden @ weight.T).topk(3).indices)


def test_vmap_works(either_code):
    hidden, weight = torch.randn(3, 5, 16), torch.randn(30, 16)
    found = torch.vmap(lambda rows: most_probable(rows, weight, 3).log_probs)(hidden)
    torch.testing.assert_close(found, (hidden @ weight.T).log_softmax(-1).topk(3).values)


def test_forward_derivatives_are_those_of_pytorch(either_code):
    hidden, weight = torch.randn(5, 16), torch.randn(30, 16)
    expected = torch.func.jvp(
        lambda rows: (rows @ weight.T).log_softmax(-1).topk(3).values, (hidden,), (hidden,)
    )
    actual = torch.func.jvp(lambda rows: most_probable(rows, weight, 3).log_probs, (hidden,), (hidden,))
    torch.testing.assert_close(actual, expected)


def test_a_flop_counter_sees_what_pytorch_would_count(either_code):
    with FlopCounterMode(display=False) as counter:
        most_probable(torch.randn(5, 16), torch.randn(30, 16), 3)
    assert counter.get_total_flops() == 2 * 5 * 16 * 30


def test_the_operator_keeps_pytorchs_rules(compiled_code):
    arguments = (torch.randn(5, 16), torch.randn(30, 16), 3)
    torch.library.opcheck(torch.ops.moe_edu.most_probable.default, arguments)


def test_compiled_code_runs_where_it_can(monkeypatch):
    called = []
    monkeypatch.setattr(vocabulary, "can_be_compiled", lambda *tensors: True)
    monkeypatch.setattr(vocabulary, "call", lambda *arguments: called.append(arguments[0]))
    most_probable(torch.randn(16, 5).T, torch.randn(30, 16), 30)
    assert called == ["most_probable"]


def test_compiled_code_never_runs_where_it_cannot(monkeypatch):
    """It would read and write beyond the tensors' memory."""
    monkeypatch.setattr(vocabulary, "can_be_compiled", lambda *tensors: True)
    monkeypatch.setattr(vocabulary, "call", lambda *arguments: pytest.fail("compiled code was called"))
    hidden, weight = torch.randn(5, 16), torch.randn(30, 16)
    with pytest.raises(RuntimeError, match="shape"):
        most_probable(hidden[:, :8], weight, 3)
    with pytest.raises(RuntimeError, match="range"):
        most_probable(hidden, weight, 31)
    most_probable(hidden[:, ::2], weight[:, ::2], 3)
    most_probable(hidden.repeat(1, 1), weight.repeat(4, 1), 100)  # too many to sort by insertion
