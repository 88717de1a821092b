"""The router's linear map: its precision, and the tools that look at it as at any `nn.Linear`."""

import pytest
import torch
from torch.nn import functional as F
from torch.nn.utils import prune

from moe_edu.model.encoder import MoEEncoder
from moe_edu.moe.routing import Top2Router


class TestRouterPrecision:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_gates_are_computed_in_float32_for_a_half_precision_model(self, tiny_config, dtype):
        torch.manual_seed(0)
        router = Top2Router(tiny_config(router_bias=True)).to(dtype)
        hidden = torch.randn(2, 5, 8, dtype=dtype)
        routing = router(hidden)
        assert routing.logits.dtype == routing.combine_weights.dtype == torch.float32
        weight, bias = router.classifier.weight, router.classifier.bias
        expected = F.linear(hidden.flatten(0, 1).float(), weight.float(), bias.float())
        assert torch.equal(routing.logits, expected)
        assert weight.dtype == dtype, "the parameter must not be re-cast"

    def test_autocast_does_not_lower_the_precision(self, tiny_config):
        torch.manual_seed(0)
        router, hidden = Top2Router(tiny_config()), torch.randn(2, 5, 8)
        expected = router(hidden).logits
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(router(hidden).logits, expected)

    @pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
    def test_router_dtype_is_that_of_the_results(self, tiny_config, name):
        routing = Top2Router(tiny_config(router_dtype=name))(torch.zeros(1, 3, 8))
        assert routing.probs.dtype == routing.combine_weights.dtype == getattr(torch, name)


class TestToolsSeeTheLinearMap:
    """It is called as a module, so tools treat it like any `nn.Linear`."""

    def test_a_forward_hook_fires(self, tiny_config):
        router, seen = Top2Router(tiny_config()), []
        router.classifier.register_forward_hook(lambda module, inputs, output: seen.append(output))
        routing = router(torch.randn(2, 5, 8))
        assert seen[0] is routing.logits

    def test_a_hook_may_change_the_logits(self, tiny_config):
        router = Top2Router(tiny_config())
        router.classifier.register_forward_hook(
            lambda module, inputs, output: output.index_fill(1, torch.tensor(2), 9)
        )
        assert (router(torch.randn(2, 5, 8)).expert_index[:, 0] == 2).all()

    def test_pruned_weights_are_those_that_route(self, tiny_config):
        router, hidden = Top2Router(tiny_config()), torch.randn(2, 5, 8)
        prune.l1_unstructured(router.classifier, "weight", amount=0.5)
        pruned = router(hidden).logits
        assert (router.classifier.weight == 0).sum() == router.classifier.weight.numel() // 2
        assert torch.equal(pruned, F.linear(hidden.flatten(0, 1), router.classifier.weight))
        with torch.no_grad():
            router.classifier.weight_orig.mul_(2)
        assert torch.equal(router(hidden).logits, 2 * pruned)

    @pytest.mark.filterwarnings(
        "ignore::DeprecationWarning", "ignore:.*quantized tensor creation:UserWarning"
    )
    def test_a_quantised_model_routes_in_full_precision(self, tiny_config):
        encoder = MoEEncoder(tiny_config()).eval()
        quantised = torch.ao.quantization.quantize_dynamic(encoder, {torch.nn.Linear}, dtype=torch.qint8)
        ids = torch.randint(3, 29, (2, 6))
        (routing,) = (layer for layer in quantised(ids).routing if layer is not None)
        assert routing.logits.dtype == torch.float32
        assert type(quantised.layers[1].self_attn.q_proj) is not torch.nn.Linear
        router = quantised.layers[1].ffn.router.classifier
        assert torch.equal(router.weight, encoder.layers[1].ffn.router.classifier.weight)
