"""The benchmark runs and measures what it says. No test looks at how long anything took."""

import dataclasses
import json
import sys
import time

import pytest
import torch
from click.testing import CliRunner

from moe_edu.bench import LayerSize, bench, run_layer_bench
from moe_edu.bench import layer as layer_bench
from moe_edu.bench import model as model_bench
from moe_edu.bench.contenders import our_layer, reference_layer
from moe_edu.bench.exact import exact_step, forward_error, gradient_error
from moe_edu.bench.layer import Measured
from moe_edu.bench.memory import can_measure_memory, in_fresh_process, peak_extra_mb
from moe_edu.bench.report import format_row, format_summary
from moe_edu.bench.timing import Timing, time_in_turn
from moe_edu.layers import SparseMLP
from moe_edu.reference import loop_sparse_mlp

TINY = LayerSize(tokens=24, experts=4, d_model=8, ffn_dim=12)


def make_problem(size: LayerSize, training: bool):
    torch.manual_seed(0)
    layer = SparseMLP(size.config()).train(training)
    hidden, upstream = torch.randn(2, 1, size.tokens, size.d_model)
    with torch.no_grad():
        return layer, hidden, upstream, layer.router(hidden)


class TestExactStep:
    @pytest.mark.parametrize("training", [False, True])
    def test_equals_the_token_by_token_loop(self, training):
        layer, hidden, upstream, routing = make_problem(TINY, training)
        layer = layer.double()
        hidden, upstream = hidden.double().requires_grad_(), upstream.double()
        routing = layer.router(hidden)
        output = loop_sparse_mlp(hidden[0], routing, layer.experts)
        output.backward(upstream[0])
        experts = layer.experts
        expected = [output[None], hidden.grad, layer.router.classifier.weight.grad]
        expected += [weight.grad[0] for weight in (experts.w1, experts.b1, experts.w2, experts.b2)]
        for mine, value in zip(exact_step(layer, hidden, routing, upstream), expected, strict=True):
            torch.testing.assert_close(mine, value)

    @pytest.mark.parametrize("training", [False, True])
    @pytest.mark.parametrize("make", [our_layer, reference_layer])
    def test_contenders_come_close_to_it(self, make, training):
        layer, hidden, upstream, routing = make_problem(TINY, training)
        exact = exact_step(layer, hidden, routing, upstream)
        assert gradient_error(make(layer), hidden, upstream, exact) < 1e-5

    # About 12, 500 and 6000 rows an expert: inference multiplies few rows in another form, and very many in pieces.
    @pytest.mark.parametrize("tokens", [24, 500, 6000])
    def test_inference_comes_close_to_it(self, tokens):
        layer, hidden, upstream, routing = make_problem(LayerSize(tokens, 2, 8, 12), False)
        exact = exact_step(layer, hidden, routing, upstream)
        for make in (our_layer, reference_layer):
            assert forward_error(make(layer), hidden, exact) < 1e-5

    @pytest.mark.parametrize("wrong", range(6))
    def test_a_wrong_gradient_is_noticed(self, wrong):
        layer, hidden, upstream, routing = make_problem(TINY, True)
        exact = exact_step(layer, hidden, routing, upstream)
        exact[1 + wrong] = exact[1 + wrong] * 1.1
        assert gradient_error(our_layer(layer), hidden, upstream, exact) > 1e-2


class TestRunLayerBench:
    def test_measures_every_size_in_every_mode(self):
        sizes = [TINY, dataclasses.replace(TINY, experts=3)]
        results = list(run_layer_bench(sizes, repeats=2, memory=False))
        assert [(r.size, r.mode) for r in results] == [
            (s, m) for s in sizes for m in ("inference", "training")
        ]
        for result in results:
            assert result.reference is not None
            assert result.ours.error < 1e-5
            assert result.reference.error < 1e-5
            assert result.ours.timing.repeats == result.reference.timing.repeats == 2
            assert result.weight_mb == pytest.approx(result.size.experts * (2 * 8 * 12 + 8 + 12) * 4 / 1e6)

    def test_bf16_leaves_the_reference_out(self):
        (result,) = run_layer_bench(
            [TINY], modes=("training",), repeats=1, dtype=torch.bfloat16, memory=False
        )
        assert result.reference is None
        assert result.speedup is None

    def test_refuses_a_wrong_result(self, monkeypatch):
        monkeypatch.setattr(
            layer_bench, "our_layer", lambda layer: dataclasses.replace(our_layer(layer), forward=torch.neg)
        )
        with pytest.raises(ArithmeticError, match="moe_edu deviates from the float64 loop"):
            next(run_layer_bench([TINY], repeats=1, memory=False))

    def test_leaves_the_random_state_alone(self):
        torch.manual_seed(3)
        expected = torch.rand(1)
        torch.manual_seed(3)
        layer_bench._make_problem(TINY, "inference", torch.float32, seed=0)
        assert torch.rand(1) == expected


def test_figures_follow_from_the_measurements():
    def measured(milliseconds, megabytes):
        return Measured(Timing(milliseconds, milliseconds, milliseconds, 1), megabytes, 0.0)

    (result,) = run_layer_bench([TINY], modes=("inference",), repeats=1, memory=False)
    result = dataclasses.replace(
        result,
        ours=measured(20.0, 30.0),
        reference=measured(50.0, 210.0),
        dense=Timing(8.0, 8.0, 8.0, 1),
        copy_gb_s=5.0,
        weight_mb=50.0,
    )
    assert result.speedup == 2.5
    assert result.memory_limit_ms == 10.0
    assert result.roofline_ms == 10.0
    assert result.roofline_share == 0.5
    assert result.memory_ratio == pytest.approx(1 / 7)
    training = dataclasses.replace(result, mode="training", gradient_mb=10.0)
    assert training.roofline_ms == 30.0
    assert training.memory_ratio == pytest.approx(0.1)
    assert "2.50x" in format_row(result)
    assert "share of the roofline 0.50 in the median" in format_summary([result])


class TestTimeInTurn:
    def test_functions_run_in_turn(self):
        calls = []
        timings = time_in_turn({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repeats=3)
        assert calls == ["a", "b"] * 3
        assert timings["a"].repeats == 3
        assert timings["a"].fastest_ms <= timings["a"].median_ms <= timings["a"].slowest_ms

    def test_a_slow_function_sits_out(self):
        timings = time_in_turn(
            {"slow": lambda: time.sleep(0.02), "fast": lambda: None}, repeats=5, seconds_each=0.01
        )
        assert timings["slow"].repeats == 1
        assert timings["fast"].repeats == 5


@pytest.mark.skipif(not can_measure_memory(), reason="peak memory can be measured on Linux only")
class TestMemory:
    def test_sees_memory_that_a_call_takes_and_frees(self):
        assert 64 <= in_fresh_process(_peak_of_64_mb) < 80

    def test_the_layer_needs_far_less_than_the_reference(self):
        """The reference holds `[E, T, D]`: 134 MB here."""
        size = LayerSize(tokens=2048, experts=64, d_model=256, ffn_dim=8)
        ours, reference = (
            in_fresh_process(layer_bench.measure_peak, size, "inference", torch.float32, name, 1, 0)
            for name in ("moe_edu", "transformers")
        )
        assert reference > 134
        assert ours < reference / 4


def _peak_of_64_mb() -> float:
    return peak_extra_mb(lambda: torch.ones(16_000_000).sum())


class TestCommand:
    def test_quick_prints_a_table_and_writes_json(self, tmp_path):
        path = tmp_path / "layer.json"
        result = CliRunner().invoke(bench, ["layer", "--quick", "--output", str(path)])
        assert result.exit_code == 0, result.output
        assert [line.split()[0] for line in result.output.splitlines()[1:4]] == [
            "mode",
            "inference",
            "training",
        ]
        document = json.loads(path.read_text())
        assert document["machine"]["torch"] == torch.__version__
        assert [r["mode"] for r in document["results"]] == ["inference", "training"]
        assert {"roofline_share", "speedup", "ours", "reference"} <= document["results"][0].keys()

    def test_says_what_to_do_without_the_reference(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "transformers", None)
        result = CliRunner().invoke(bench, ["layer", "--quick"])
        assert result.exit_code == 0, result.output
        assert "pip install transformers==4.57.6" in result.output

    @pytest.mark.parametrize("text", ["", "0", "8,x", "8,,9"])
    def test_refuses_bad_sizes(self, text):
        result = CliRunner().invoke(bench, ["layer", "--tokens", text])
        assert result.exit_code == 2
        assert "positive whole numbers" in result.output


class TestModelBench:
    def test_quick_run_prints_and_writes(self, tmp_path):
        path = tmp_path / "model.json"
        outcome = CliRunner().invoke(bench, ["model", "--quick", "--processes", "1", "--output", str(path)])
        assert outcome.exit_code == 0, outcome.output
        assert "training" in outcome.output
        assert "beams 4" in outcome.output
        written = json.loads(path.read_text("utf-8"))
        assert written["machine"]["processor"]
        result = written["result"]
        assert result["processes"] == 1
        assert result["training"]["tokens"] > 0
        for part in ("training", "generation"):
            ratio = result[part]["reference"]["median_ms"] / result[part]["ours"]["median_ms"]
            assert written["speedup"][part] == pytest.approx(ratio)

    def test_a_model_that_disagrees_is_not_timed(self, monkeypatch):
        """Nobody is faster with other results."""
        make = model_bench.make_reference

        def make_other(model):
            reference = make(model)
            with torch.no_grad():
                reference.model.decoder.layer_norm.bias.add_(0.1)
            return reference

        monkeypatch.setattr(model_bench, "make_reference", make_other)
        with pytest.raises(ArithmeticError, match="differ"):
            model_bench.run_model_bench(batches=1, sentences=2, beams=1, repeats=1, processes=1, quick=True)
