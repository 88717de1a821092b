"""Which back end is chosen, that it runs, and that PyTorch's grouped product accepts the widths chosen for it."""

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import moe_edu
from moe_edu.config import MoEConfig
from moe_edu.model.translator import MoETranslator
from moe_edu.moe.experts import choose_backend, explain_choice, grouped_mm_obstacle
from moe_edu.moe.layer import FeedForward, SparseMLP

E = 5
CUDA = torch.device("cuda")


def make_layer(d_model: int, ffn_dim: int, backend: str = "auto", **fields) -> SparseMLP:
    """A layer of any width, even or odd: one attention head divides them all."""
    heads = {"encoder_attention_heads": 1, "decoder_attention_heads": 1}
    return SparseMLP(MoEConfig(d_model=d_model, num_experts=E, **heads, **fields), ffn_dim, backend)


@pytest.fixture
def hopper(monkeypatch):
    """To the code that chooses, this machine's GPU has compute capability 9.0."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


@pytest.mark.parametrize("backend", ["loop", "padded", "grouped", "grouped_mm"])
def test_a_named_back_end_is_the_one_that_runs(backend, monkeypatch):
    layer = make_layer(4, 5, backend)
    choice = moe_edu.explain_backend(layer)
    assert choice.backend == backend
    assert "named" in choice.reason
    ran = []
    for name in ("loop", "padded", "grouped", "grouped_inference", "grouped_mm"):
        monkeypatch.setattr(
            f"moe_edu.moe.experts._{name}", lambda rows, *rest, name=name: ran.append(name) or rows
        )
    layer(torch.randn(2, 3, 4))
    with torch.no_grad():
        layer(torch.randn(2, 3, 4))
    assert ran == [backend, "grouped_inference" if backend == "grouped" else backend]


class TestExplain:
    """A layer's experts, the layer, or a whole model."""

    def test_a_layer_and_its_experts(self):
        layer = make_layer(4, 5)
        assert moe_edu.explain_backend(layer) == moe_edu.explain_backend(layer.experts)
        assert "float64" in moe_edu.explain_backend(layer.double()).reason

    def test_a_model_whose_layers_agree(self, tiny_config):
        model = MoETranslator(tiny_config())
        assert moe_edu.explain_backend(model) == moe_edu.explain_backend(model.encoder.layers[1].ffn)

    def test_a_model_whose_layers_differ_names_them(self, tiny_config):
        model = MoETranslator(tiny_config())
        model.encoder.layers[1].ffn.experts.backend = "loop"
        with pytest.raises(ValueError, match=r"encoder\.layers\.1\.ffn\.experts runs loop; .* runs grouped"):
            moe_edu.explain_backend(model)

    @pytest.mark.parametrize("sparse_step", [0, None])
    def test_a_module_without_experts_is_refused(self, tiny_config, sparse_step):
        if sparse_step is None:
            module = FeedForward(tiny_config(), 5)
        else:
            module = MoETranslator(tiny_config(encoder_sparse_step=0, decoder_sparse_step=0))
        with pytest.raises(ValueError, match=r"has no experts.*give it a sparse layer"):
            moe_edu.explain_backend(module)


@pytest.mark.parametrize(
    ("dtype", "widths", "capability", "backend", "reason"),
    [
        (torch.bfloat16, (256, 64), (9, 0), "grouped_mm", "one grouped product"),
        (torch.bfloat16, (256, 64), (10, 3), "grouped_mm", "one grouped product"),
        (torch.bfloat16, (256, 9), (9, 0), "padded", "16 bytes, not 18"),
        (torch.bfloat16, (20, 64), (9, 0), "padded", "16 bytes, not 40"),
        (torch.float16, (256, 64), (9, 0), "padded", "not torch.float16"),
        (torch.bfloat16, (256, 64), (7, 5), "padded", "9 and 10, not (7, 5)"),
        (torch.bfloat16, (256, 64), (8, 0), "padded", "9 and 10, not (8, 0)"),
        (torch.bfloat16, (256, 64), (12, 0), "padded", "9 and 10, not (12, 0)"),
    ],
)
def test_gpu(dtype, widths, capability, backend, reason, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    choice = explain_choice(CUDA, dtype, (E, *widths))
    assert choice.backend == choose_backend(CUDA, dtype, (E, *widths)) == backend
    assert reason in choice.reason


def test_gpu_with_many_experts(hopper):
    assert choose_backend(CUDA, torch.bfloat16, (1023, 64, 64)) == "grouped_mm"
    assert explain_choice(CUDA, torch.bfloat16, (1024, 64, 64)) == (
        "padded",
        "CUDA's grouped product takes fewer than 1,024 experts, not 1024",
    )


def test_gpu_on_windows(hopper, monkeypatch):
    monkeypatch.setattr("sys.platform", "win32")
    choice = explain_choice(CUDA, torch.bfloat16, (E, 64, 64))
    assert choice == ("padded", "PyTorch builds CUDA's grouped product for Linux, not Windows")


def test_a_back_end_that_does_not_exist_is_refused():
    with pytest.raises(
        ValueError, match="backend must be one of auto, loop, padded, grouped, grouped_mm; got 'paded'"
    ):
        make_layer(4, 5, "paded")


class TestRoom:
    """Padding must not take memory that grows as E * T * D."""

    @pytest.fixture(autouse=True)
    def an_older_gpu(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))

    @pytest.mark.parametrize("E", [8, 128])
    @pytest.mark.parametrize("T", [1, 10, 1000, 16384])
    def test_training_is_padded(self, E, T):
        capacity = -(-T // E) * 2
        assert choose_backend(CUDA, torch.bfloat16, (E, 64, 64), 2 * T, capacity) == "padded"

    @pytest.mark.parametrize("T", [100, 16384])
    def test_room_for_every_token_is_padded_for_few_experts_only(self, T):
        assert choose_backend(CUDA, torch.bfloat16, (8, 64, 64), 2 * T, T) == "padded"
        choice = explain_choice(CUDA, torch.bfloat16, (128, 64, 64), 2 * T, T)
        assert choice.backend == "grouped"
        assert choice.reason.startswith("one product per expert")


def test_what_is_explained_is_what_runs(monkeypatch):
    """This holds under autocast, too, whose dtype is not the weights', and for the capacity that the router sets."""
    asked = []

    def remember(device, dtype, shape, rows, capacity):
        asked.append((dtype, tuple(shape), rows, capacity))
        return "padded"

    monkeypatch.setattr("moe_edu.moe.experts.choose_backend", remember)
    layer = make_layer(4, 6, expert_capacity=1000)
    with torch.autocast("cpu", torch.bfloat16):
        layer(torch.randn(2, 5, 4))
    assert moe_edu.explain_backend(layer).backend == "padded"
    shape = (E, 6, 4)
    assert asked == [(torch.bfloat16, shape, 20, 1000), (torch.float32, shape, 0, 0)]


def test_a_forward_pass_formats_no_reason(monkeypatch):
    monkeypatch.setattr("moe_edu.moe.experts.explain_choice", lambda *_: pytest.fail("formatted a reason"))
    monkeypatch.setattr("moe_edu.moe.experts.Obstacle.__str__", lambda _: pytest.fail("formatted a reason"))
    make_layer(4, 6)(torch.randn(2, 5, 4))


class TestWithoutMemory:
    """Tensors without memory run the same code as on a GPU: PyTorch checks strides, and no value can be read."""

    def step(self, layer: SparseMLP, tokens: int) -> None:
        """Forward and backward, with the expanded gradient that a sum sends back."""
        with FakeTensorMode(allow_non_fake_inputs=True):
            hidden = torch.randn(2, tokens, layer.config.d_model, dtype=torch.bfloat16)
            output, _ = layer(hidden.requires_grad_())
            output.sum().backward()

    @pytest.mark.parametrize("widths", [(24, 16), (24, 20), (20, 16), (17, 16)])
    @pytest.mark.parametrize("tokens", [0, 1, 7])
    def test_pytorch_accepts_exactly_the_widths_chosen_for_it(self, widths, tokens, hopper):
        ffn_dim, d_model = widths
        layer = make_layer(d_model, ffn_dim, "grouped_mm", moe_token_dropout=0.2).bfloat16()
        if grouped_mm_obstacle(CUDA, torch.bfloat16, (E, *widths)) is None:
            self.step(layer, tokens)
        else:
            with pytest.raises(RuntimeError, match="16 bytes"):
                self.step(layer, tokens)

    @pytest.mark.parametrize("policy", ["all", "sampling", "random"])
    @pytest.mark.parametrize("backend", ["grouped_mm", "padded"])
    def test_neither_reads_a_value(self, backend, policy):
        layer = make_layer(16, 24, backend, moe_token_dropout=0.2, second_expert_policy=policy)
        self.step(layer.bfloat16(), 7)

    def test_one_product_per_expert_does(self):
        """This shows that the test above can fail."""
        with pytest.raises(DataDependentOutputException):
            self.step(make_layer(16, 24, "grouped").bfloat16(), 7)
