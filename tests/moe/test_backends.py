"""Which back end is chosen, that it runs, and that PyTorch's grouped product takes what is chosen for it."""

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import moe_edu
from moe_edu.config import MoEConfig
from moe_edu.moe.backends import BackendChoice, choose_backend, why_no_grouped_mm
from moe_edu.moe.layer import SparseMLP

E = 5
CUDA = torch.device("cuda")


def make_layer(d_model: int, ffn_dim: int, backend: str = "auto", **fields) -> SparseMLP:
    """Odd widths are welcome: one attention head divides them all."""
    heads = {"encoder_attention_heads": 1, "decoder_attention_heads": 1}
    return SparseMLP(MoEConfig(d_model=d_model, num_experts=E, **heads, **fields), ffn_dim, backend)


@pytest.fixture
def hopper(monkeypatch):
    """A GPU of compute capability 9.0, as far as the choice can see."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


@pytest.mark.parametrize("backend", ["loop", "grouped", "padded"])
def test_a_named_back_end_runs(backend):
    choice = moe_edu.explain_backend(make_layer(4, 5, backend).experts)
    assert choice.backend == backend
    assert "named" in choice.reason


@pytest.mark.parametrize(
    ("dtype", "widths", "capability", "backend", "reason"),
    [
        (torch.bfloat16, (256, 64), (9, 0), "grouped", "one grouped product"),
        (torch.bfloat16, (256, 64), (10, 3), "grouped", "one grouped product"),
        (torch.bfloat16, (256, 9), (9, 0), "padded", "16 bytes, not 18"),
        (torch.bfloat16, (20, 64), (9, 0), "padded", "16 bytes, not 40"),
        (torch.float16, (256, 64), (9, 0), "padded", "not float16"),
        (torch.bfloat16, (256, 64), (7, 5), "padded", "9 and 10, not 7.5"),
        (torch.bfloat16, (256, 64), (8, 0), "padded", "9 and 10, not 8.0"),
        (torch.bfloat16, (256, 64), (12, 0), "padded", "9 and 10, not 12.0"),
    ],
)
def test_gpu(dtype, widths, capability, backend, reason, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    choice = choose_backend(CUDA, dtype, (E, *widths))
    assert choice.backend == backend
    assert reason in choice.reason


def test_gpu_with_many_experts(hopper):
    assert choose_backend(CUDA, torch.bfloat16, (1023, 64, 64)).backend == "grouped"
    assert choose_backend(CUDA, torch.bfloat16, (1024, 64, 64)) == (
        "padded",
        "CUDA's grouped product takes fewer than 1,024 experts, not 1024",
    )


def test_gpu_on_windows(hopper, monkeypatch):
    monkeypatch.setattr("sys.platform", "win32")
    assert choose_backend(CUDA, torch.bfloat16, (E, 64, 64)).backend == "padded"


def test_a_back_end_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="backend must be one of auto, loop, grouped, padded; got 'paded'"):
        make_layer(4, 5, "paded")


class TestRoom:
    """Padding must not take memory as E * T * D does."""

    @pytest.fixture(autouse=True)
    def an_older_gpu(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
        monkeypatch.setattr(
            "moe_edu.moe.backends.choose_backend", lambda device, *rest: choose_backend(CUDA, *rest)
        )

    @pytest.mark.parametrize("E", [8, 128])
    @pytest.mark.parametrize("T", [1, 10, 1000, 16384])
    def test_training_is_padded(self, E, T):
        assert self.choice(E, T, -(-T // E) * 2).backend == "padded"

    @pytest.mark.parametrize("T", [100, 16384])
    def test_room_for_every_token_is_padded_for_few_experts_only(self, T):
        assert self.choice(8, T, T).backend == "padded"
        choice = self.choice(128, T, T)
        assert choice.backend == "grouped"
        assert choice.reason.startswith("one product an expert")

    def choice(self, experts: int, tokens: int, capacity: int) -> BackendChoice:
        with torch.device("meta"):
            layer = SparseMLP(MoEConfig(d_model=64, num_experts=experts), 64)
        return moe_edu.explain_backend(layer.experts, torch.bfloat16, 2 * tokens, capacity)


def test_what_is_explained_is_what_runs(monkeypatch):
    """Under autocast, too, whose dtype is not the weights'; and with the room that the router gives."""
    asked = []

    def remember(device, dtype, shape, few_slots):
        asked.append((dtype, tuple(shape), few_slots))
        return BackendChoice("padded", "it is a test")

    monkeypatch.setattr("moe_edu.moe.backends.choose_backend", remember)
    layer = make_layer(4, 6, expert_capacity=1000)
    with torch.autocast("cpu", torch.bfloat16):
        layer(torch.randn(2, 5, 4))
        layer(torch.randn(2, 50, 4))
    assert moe_edu.explain_backend(layer.experts).reason == "it is a test"
    shape = (E, 6, 4)
    assert asked == [
        (torch.bfloat16, shape, True),
        (torch.bfloat16, shape, False),
        (torch.float32, shape, True),
    ]


class TestWithoutMemory:
    """Tensors without memory take the steps of a GPU: PyTorch checks strides, and no value can be read."""

    def step(self, layer: SparseMLP, tokens: int) -> None:
        """Forward and backward, with the expanded gradient that a sum sends back."""
        with FakeTensorMode(allow_non_fake_inputs=True):
            hidden = torch.randn(2, tokens, layer.config.d_model, dtype=torch.bfloat16)
            output, _ = layer(hidden.requires_grad_())
            output.sum().backward()

    @pytest.fixture
    def on_the_gpu(self, monkeypatch):
        """PyTorch's grouped product is run, whatever is chosen."""
        monkeypatch.setattr("moe_edu.moe.experts.why_no_grouped_mm", lambda device, dtype, shape: None)

    @pytest.mark.parametrize("widths", [(24, 16), (24, 20), (20, 16), (17, 16)])
    @pytest.mark.parametrize("tokens", [0, 1, 7])
    def test_pytorch_takes_just_the_widths_that_are_chosen_for_it(self, widths, tokens, on_the_gpu, hopper):
        ffn_dim, d_model = widths
        layer = make_layer(d_model, ffn_dim, "grouped", moe_token_dropout=0.2).bfloat16()
        if why_no_grouped_mm(CUDA, torch.bfloat16, (E, *widths)) is None:
            self.step(layer, tokens)
        else:
            with pytest.raises(RuntimeError, match="16 bytes"):
                self.step(layer, tokens)

    @pytest.mark.parametrize("policy", ["all", "sampling", "random"])
    @pytest.mark.parametrize("backend", ["grouped", "padded"])
    def test_neither_reads_a_value(self, backend, policy, on_the_gpu):
        layer = make_layer(16, 24, backend, moe_token_dropout=0.2, second_expert_policy=policy)
        self.step(layer.bfloat16(), 7)

    def test_one_product_an_expert_does(self):
        """So the test above would notice."""
        with pytest.raises(DataDependentOutputException):
            self.step(make_layer(16, 24, "grouped").bfloat16(), 7)
