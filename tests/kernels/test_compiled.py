"""Where compiled code runs, and the reasons given where it does not."""

import shutil
import sys

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

from moe_edu import MoEConfig, MoEEncoder
from moe_edu.kernels import compiled
from moe_edu.kernels.compiled import can_be_compiled, has_tangent, why_not_compiled


def test_is_built_where_there_is_a_compiler():
    if sys.platform != "linux" or shutil.which("cc") is None:
        pytest.skip("no C compiler that the build would use")
    assert compiled._LIBRARY is not None, "install moe_edu again: the compiler was installed after it"


def test_says_why_it_is_not_compiled(monkeypatch):
    class Library:
        @staticmethod
        def is_supported() -> int:
            return 0

    assert "bfloat16" in why_not_compiled(torch.bfloat16)
    assert "AVX2" in compiled._why_not(Library)
    assert "C compiler" in compiled._why_not(None)
    monkeypatch.setattr(compiled, "_WHY_NOT", "for a reason")
    assert why_not_compiled(torch.float32) == "for a reason"
    assert "bfloat16" in why_not_compiled(torch.bfloat16)


def test_a_library_of_another_system_is_ignored(monkeypatch, tmp_path):
    (tmp_path / "foreign.so").write_bytes(b"not a library")

    class Spec:
        origin = str(tmp_path / "foreign.so")

    monkeypatch.setattr(compiled.importlib.util, "find_spec", lambda name: Spec)
    assert compiled._load_library() is None


def test_takes_fp32_on_the_cpu_only(monkeypatch):
    monkeypatch.setattr(compiled, "_WHY_NOT", None)
    x = torch.zeros(2)
    assert can_be_compiled(x, x)
    assert not can_be_compiled(x, x.double())
    assert not can_be_compiled(x, x.to("meta"))
    monkeypatch.setattr(compiled, "_WHY_NOT", "for a reason")
    assert not can_be_compiled(x, x)


def test_recognises_a_tangent():
    x, seen = torch.ones(2), []
    torch.func.jvp(lambda y: seen.append(has_tangent(x, y)) or y, (x,), (x,))
    with forward_ad.dual_level():
        seen += [has_tangent(x), has_tangent(forward_ad.make_dual(x, x))]
    assert seen == [True, False, True]
    assert not has_tangent(x)


class LastHiddenState(nn.Module):
    """Returns a tensor, since torch.jit accepts no named tuples that contain None."""

    def __init__(self, encoder: MoEEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.encoder(ids).last_hidden_state


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.* is deprecated")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("gradients", [False, True])
def test_a_traced_layer_computes_what_the_layer_does(gradients):
    """Outside of operators, torch.jit turns sizes into tensors, whose addresses compiled code would take for sizes."""
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = MoEConfig(d_model=16, encoder_layers=1, num_experts=3, vocab_size=50, **heads)
    model = LastHiddenState(MoEEncoder(config)).eval()
    ids = torch.randint(3, 50, (2, 6))
    with torch.set_grad_enabled(gradients):
        traced = torch.jit.trace(model, ids, check_trace=False)
        torch.testing.assert_close(traced(ids), model(ids))
