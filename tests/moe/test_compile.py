"""torch.compile makes one graph of the whole sparse layer, and reuses it when the number of tokens changes."""

from types import SimpleNamespace

import pytest
import torch
import torch._dynamo  # imported here, since during a test it would take the test's fake GPU for a real one

from moe_edu.config import MoEConfig
from moe_edu.moe import experts
from moe_edu.moe.experts import choose_backend
from moe_edu.moe.layer import SparseMLP

E, D, F = 5, 16, 24

FIELDS = {
    "plain": {},
    "capacity": {"expert_capacity_factor": 1.25, "moe_eval_capacity_token_fraction": -1.0},
    "noise": {
        "second_expert_policy": "sampling",
        "moe_token_dropout": 0.2,
        "batch_prioritized_routing": True,
    },
    "random": {"second_expert_policy": "random", "normalize_router_prob_before_dropping": True},
}


BACKENDS = ["padded", "grouped_mm", "auto 8.0", "auto 9.0"]
# The router does not depend on the back end: each is tested with the other's hardest case only.
PAIRS = [("padded", name) for name in FIELDS] + [(name, "noise") for name in BACKENDS[1:]]


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    """One of the back ends that GPUs run, or the one that a GPU of the given compute capability chooses.

    The CPU can compute all of them.
    """
    name, _, capability = request.param.partition(" ")
    if name == "auto":
        major, minor = map(int, capability.split("."))
        properties = SimpleNamespace(major=major, minor=minor)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        monkeypatch.setattr(
            experts, "choose_backend", lambda device, *rest: choose_backend(torch.device("cuda"), *rest)
        )
    torch._dynamo.reset()
    yield name
    torch._dynamo.reset()


def make_layer(backend: str, training: bool, **fields) -> SparseMLP:
    config = MoEConfig(
        d_model=D,
        encoder_attention_heads=1,
        decoder_attention_heads=1,
        num_experts=E,
        init_std=0.5,
        **{"moe_token_dropout": 0.0} | fields,
    )
    # While being traced, PyTorch's grouped product accepts bf16 only.
    dtype = torch.float32 if backend == "padded" else torch.bfloat16
    return SparseMLP(config, F, backend).to(dtype).train(training)


def step(layer, call, sentence_length: int) -> list[torch.Tensor]:
    """The output of `call` and, in training, every gradient."""
    torch.manual_seed(sentence_length)
    dtype = layer.experts.w1.dtype
    hidden = torch.randn(2, sentence_length, D).to(dtype).requires_grad_(layer.training)
    padding = torch.zeros(2, sentence_length, dtype=torch.bool)
    padding[1, -2:] = True
    with torch.set_grad_enabled(layer.training):
        output, _ = call(hidden, padding)
    if not layer.training:
        return [output]
    return [output, *torch.autograd.grad(output.square().sum(), [hidden, *layer.parameters()])]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("backend", "fields"), PAIRS, indirect=["backend"])
def test_one_graph_serves_every_number_of_tokens(backend, fields, training):
    layer = make_layer(backend, training, **FIELDS[fields])
    graphs = []

    def remember(graph, _):
        graphs.append(graph)
        return graph.forward

    # `fullgraph` refuses every graph break.
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=remember)
    for sentence_length in (7, 12, 33, 64):
        for actual, expected in zip(
            step(layer, compiled, sentence_length), step(layer, layer, sentence_length), strict=True
        ):
            assert torch.equal(actual, expected)
    assert len(graphs) == 1


def test_without_a_hint_the_second_graph_serves_them_all(backend):
    """torch.compile first assumes that a size is fixed, and learns from a second size that it is not."""
    layer = make_layer(backend, training=True)
    graphs = []

    def remember(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(layer, fullgraph=True, backend=remember)
    for sentence_length in (7, 12, 33, 64):
        step(layer, compiled, sentence_length)
    assert len(graphs) == 2


@pytest.mark.parametrize("training", [False, True])
def test_the_cpu_layer_computes_the_same_compiled(training):
    """Its loop over the experts reads their row counts, which breaks the graph but changes no value."""
    layer = make_layer("auto", training)
    compiled = torch.compile(layer, backend="eager")
    for sentence_length in (7, 12):
        for actual, expected in zip(
            step(layer, compiled, sentence_length), step(layer, layer, sentence_length), strict=True
        ):
            assert torch.equal(actual, expected)
