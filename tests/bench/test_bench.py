"""The benchmark runs and measures what it says. No test depends on how long anything took."""

import contextlib
import dataclasses
import json
import re
import sys
import time
import types
from xml.etree import ElementTree

import pytest
import torch
from click.testing import CliRunner

from moe_edu.bench import LayerSize, run_layer_bench
from moe_edu.bench import explorers as explorers_bench
from moe_edu.bench import layer as layer_bench
from moe_edu.bench import model as model_bench
from moe_edu.bench.command import bench
from moe_edu.bench.contenders import our_layer, with_backend
from moe_edu.bench.curve import curve_sizes, format_curve, make_curves
from moe_edu.bench.exact import exact_step, forward_error, gradient_error
from moe_edu.bench.explorers import Redraw, explorers_svg
from moe_edu.bench.layer import LIBRARIES, Case, Measured, explain_missing
from moe_edu.bench.libraries import REFERENCE, reference_layer, scattermoe, st_moe, transformers_experts
from moe_edu.bench.memory import can_measure_memory, in_fresh_process, peak_extra_mb
from moe_edu.bench.plot import Panel, Row, Sample, curves_svg, dots_svg
from moe_edu.bench.report import format_row, format_summary
from moe_edu.bench.timing import Timing, time_in_turn
from moe_edu.moe.layer import SparseMLP
from moe_edu.moe.loops import loop_sparse_mlp
from moe_edu.system.machine import this_machine

SVG = {"svg": "http://www.w3.org/2000/svg"}
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

    # About 12, 500 and 6000 rows per expert: inference uses another form for few rows, and splits very many.
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
            reference = result.others[REFERENCE]
            assert result.ours.error < 1e-5
            assert reference.error < 1e-5
            assert result.ours.timing.repeats == reference.timing.repeats == 2
            assert result.weight_mb == pytest.approx(result.size.experts * (2 * 8 * 12 + 8 + 12) * 4 / 1e6)

    def test_bf16_leaves_transformers_out(self):
        (result,) = run_layer_bench(
            [TINY], modes=("training",), repeats=1, dtype=torch.bfloat16, memory=False
        )
        assert REFERENCE not in result.others
        assert "its routing differs" in result.left_out[REFERENCE]
        assert result.dtype == "bfloat16"

    def test_refuses_a_wrong_result(self, monkeypatch):
        monkeypatch.setattr(
            layer_bench, "our_layer", lambda layer: dataclasses.replace(our_layer(layer), forward=torch.neg)
        )
        with pytest.raises(ArithmeticError, match="moe_edu deviates from the float64 loop"):
            next(run_layer_bench([TINY], repeats=1, memory=False))

    def test_leaves_out_a_contender_that_is_wrong_or_fails(self):
        def wrong(layer):
            return dataclasses.replace(our_layer(layer), forward=torch.neg)

        def failing(layer):
            return dataclasses.replace(our_layer(layer), forward=lambda hidden: hidden @ hidden)

        contenders = {"wrong": wrong, "failing": failing, "right": our_layer}
        for result in run_layer_bench([TINY], contenders=contenders, repeats=1, memory=False):
            assert list(result.others) == ["right"]
            assert "deviates from the float64 loop" in result.left_out["wrong"]
            assert "Expected size" in result.left_out["failing"]
            assert "left out" in format_row(result)

    def test_does_not_change_the_random_state(self):
        torch.manual_seed(3)
        expected = torch.rand(1)
        torch.manual_seed(3)
        layer_bench.make_problem(Case(TINY, "inference", torch.float32, torch.device("cpu")))
        assert torch.rand(1) == expected


def test_figures_follow_from_the_measurements():
    def measured(milliseconds, megabytes):
        return Measured(Timing(milliseconds, milliseconds, milliseconds, 1), megabytes, 0.0)

    (result,) = run_layer_bench([TINY], modes=("inference",), repeats=1, memory=False)
    result = dataclasses.replace(
        result,
        ours=measured(20.0, 30.0),
        others={"other": measured(50.0, 210.0)},
        dense=Timing(8.0, 8.0, 8.0, 1),
        copy_gb_s=5.0,
        weight_mb=50.0,
    )
    assert result.speedup("other") == 2.5
    assert result.of_dense == 0.4
    assert result.memory_limit_ms == 10.0
    assert result.roofline_ms == 10.0
    assert result.roofline_share == 0.5
    assert result.memory_ratio("other") == pytest.approx(1 / 7)
    training = dataclasses.replace(result, mode="training", gradient_mb=10.0)
    assert training.roofline_ms == 30.0
    assert training.memory_ratio("other") == pytest.approx(0.1)
    assert training.extra_mb == 20.0
    assert "2.50x" in format_row(result)
    summary = format_summary([result])
    assert "share of the roofline 0.50 in the median" in summary
    assert "2.50 to 2.50 times the speed of other" in summary


class TestTimeInTurn:
    def test_functions_run_in_turn(self):
        calls = []
        timings = time_in_turn({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repeats=3)
        assert calls == ["a", "b"] * 3
        assert timings["a"].repeats == 3
        assert timings["a"].fastest_ms <= timings["a"].median_ms <= timings["a"].slowest_ms

    def test_a_slow_function_skips_rounds(self):
        timings = time_in_turn(
            {"slow": lambda: time.sleep(0.02), "fast": lambda: None}, repeats=5, seconds_each=0.01
        )
        assert timings["slow"].repeats == 1
        assert timings["fast"].repeats == 5


@pytest.mark.skipif(not can_measure_memory(), reason="peak memory can be measured only on Linux")
class TestMemory:
    def test_sees_memory_that_a_call_takes_and_frees(self):
        assert 64 <= in_fresh_process(_peak_of_64_mb) < 80

    def test_the_layer_needs_far_less_than_transformers(self):
        """transformers holds `[E, T, D]`: 134 MB here."""
        size = LayerSize(tokens=2048, experts=64, d_model=256, ffn_dim=8)
        case = Case(size, "inference", torch.float32, torch.device("cpu"))
        ours, reference = (
            in_fresh_process(layer_bench.measure_peak, case, make, 1) for make in (our_layer, reference_layer)
        )
        assert reference > 134
        assert ours < reference / 4

    def test_gradients_are_part_of_a_training_step(self):
        """Even those whose memory the layer keeps for its next step."""
        size = LayerSize(tokens=64, experts=16, d_model=512, ffn_dim=1024)
        case = Case(size, "training", torch.float32, torch.device("cpu"))
        gradients_mb = 16 * 2 * 512 * 1024 * 4 / 1e6
        ours = in_fresh_process(layer_bench.measure_peak, case, our_layer, 1)
        assert gradients_mb < ours < 1.5 * gradients_mb


def _peak_of_64_mb() -> float:
    return peak_extra_mb(lambda: torch.ones(16_000_000).sum())


class TestLibraries:
    """Installed libraries are compared; one line says why each of the others is not."""

    @pytest.mark.parametrize(
        ("make", "module"),
        [(st_moe, "st_moe_pytorch"), (scattermoe, "scattermoe"), (reference_layer, "transformers")],
    )
    def test_say_what_is_missing(self, make, module, monkeypatch):
        monkeypatch.setitem(sys.modules, module, None)
        monkeypatch.setattr("moe_edu.bench.libraries.require_gpu", lambda layer: None)
        with pytest.raises(ImportError, match="pip install"):
            make(SparseMLP(TINY.config()))

    @pytest.mark.parametrize("training", [False, True])
    @pytest.mark.parametrize("back_end", ["eager", "grouped_mm"])
    def test_stacked_experts_of_release_5(self, back_end, training, monkeypatch):
        """With a stand-in for its interface: releases 4 and 5 cannot share an environment."""
        monkeypatch.setitem(sys.modules, "transformers", stand_in_for_release_5())
        monkeypatch.setitem(
            sys.modules, "transformers.models.nemotron_h.modeling_nemotron_h", sys.modules["transformers"]
        )
        layer, hidden, upstream, routing = make_problem(TINY, training)
        contender = transformers_experts(back_end, layer)
        assert contender.module[1].config._experts_implementation == back_end
        exact = exact_step(layer, hidden, routing, upstream)
        assert gradient_error(contender, hidden, upstream, exact) < 1e-5
        exact[-2] = exact[-2] * 1.1
        assert gradient_error(contender, hidden, upstream, exact) > 1e-2

    def test_st_moe_uses_our_routing(self, monkeypatch):
        """With a stand-in for its layer, which multiplies one-hot tensors as the library does."""
        library = types.ModuleType("st_moe_pytorch")
        library.MoE = StandInForStMoe
        monkeypatch.setitem(sys.modules, "st_moe_pytorch", library)
        layer, hidden, upstream, routing = make_problem(TINY, training=True)
        assert not routing.kept.all(), "choose sizes at which something is dropped"
        exact = exact_step(layer, hidden, routing, upstream)
        assert gradient_error(st_moe(layer), hidden, upstream, exact) < 1e-5

    def test_gpu_libraries_are_not_tried_on_the_cpu(self):
        assert explain_missing({"scattermoe": scattermoe}, torch.float32, "cpu") == {
            "scattermoe": "it needs a GPU"
        }

    def test_transformers_is_installed(self):
        assert REFERENCE not in explain_missing(LIBRARIES, torch.float32, "cpu")


def stand_in_for_release_5() -> types.ModuleType:
    class Config:
        def __init__(self, **fields):
            vars(self).update(fields)

    class NemotronHExperts(torch.nn.Module):
        def __init__(self, config):
            super().__init__()
            self.config = config
            E, D, F = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
            self.up_proj = torch.nn.Parameter(torch.empty(E, F, D))
            self.down_proj = torch.nn.Parameter(torch.empty(E, D, F))

        def forward(self, hidden, index, weights):
            rows = torch.einsum("td,tkfd->tkf", hidden, self.up_proj[index]).relu()
            return torch.einsum("tk,tkf,tkdf->td", weights, rows, self.down_proj[index])

    module = types.ModuleType("transformers")
    module.__version__, module.NemotronHConfig, module.NemotronHExperts = "5.0.0", Config, NemotronHExperts
    return module


class StandInForStMoe(torch.nn.Module):
    def __init__(self, dim, num_experts, experts):
        super().__init__()
        self.experts = experts

    def forward(self, hidden):
        dispatch, combine, *_ = self.gate(hidden)
        rows = torch.einsum("bnd,bnec->becd", hidden, dispatch)
        rows = torch.stack([expert(rows[:, e]) for e, expert in enumerate(self.experts)], dim=1)
        return types.SimpleNamespace(outputs=torch.einsum("becd,bnec->bnd", rows, combine))


def test_a_named_back_end_shares_the_parameters():
    layer = SparseMLP(TINY.config()).eval()
    padded = with_backend(layer, "padded")
    assert [p.data_ptr() for p in padded.parameters()] == [p.data_ptr() for p in layer.parameters()]
    assert padded.experts.backend == "padded"
    assert not padded.experts.training
    assert layer.experts.backend == "auto"


class TestCurve:
    def test_each_size_once(self):
        sizes = curve_sizes((2, 4), (8, 16), at_experts=4, at_tokens=8, d_model=8, ffn_dim=12)
        assert [(size.experts, size.tokens) for size in sizes] == [(2, 8), (4, 8), (4, 16)]

    def test_growth_is_reported_from_end_to_end(self):
        sizes = curve_sizes((2, 8), (24, 48), at_experts=2, at_tokens=24, d_model=8, ffn_dim=12)
        results = []
        for size, ms, mb in zip(sizes, (10.0, 12.0, 21.0), (4.0, 4.4, 8.0), strict=True):
            (result,) = run_layer_bench([size], contenders={}, modes=("training",), repeats=1, memory=False)
            timing = Timing(ms, ms, ms, 1)
            results.append(
                dataclasses.replace(
                    result, ours=Measured(timing, 1.0 + mb, 0.0), gradient_mb=1.0, dense=timing, weight_mb=0.0
                )
            )
        experts, tokens = make_curves(results, at_experts=2, at_tokens=24)
        assert format_curve(experts) == (
            "training, 24 tokens: 4 times as many experts (2 to 8) take 1.20 times the time (the roofline 1.20) and "
            "1.10 times the extra memory"
        )
        assert "2 times as many tokens (24 to 48) take 2.10 times the time" in format_curve(tokens)


class TestPlot:
    def test_dots_show_every_sample_and_escape_their_text(self):
        rows = [
            Row("a < b", {"x & y": Sample(2.0, 1.0, 4.0), "z": Sample(8.0)}),
            Row("c", {"z": Sample(1.0)}),
        ]
        root = ElementTree.fromstring(dots_svg("Title", "machine", "ms", rows))
        labels = [title.text for title in root.iterfind(".//svg:path/svg:title", SVG)]
        assert sorted(labels) == sorted(["x & y", "z", "a < b, x & y: 2", "a < b, z: 8", "c, z: 1"])
        assert root.find("svg:title", SVG).text == "Title"
        assert root.find("svg:desc", SVG).text == "machine"

    def test_a_logarithmic_axis_puts_equal_ratios_equally_far_apart(self):
        rows = [Row(str(v), {"s": Sample(v)}) for v in (1.0, 10.0, 100.0)]
        root = ElementTree.fromstring(dots_svg("t", "m", "ms", rows))
        marks = [
            path for path in root.iterfind(".//svg:path", SVG) if ", s:" in path.find("svg:title", SVG).text
        ]
        first, second, third = (float(re.search(r"\((\S+) ", mark.get("transform"))[1]) for mark in marks)
        assert second - first == pytest.approx(third - second, abs=0.2)
        assert second - first > 50

    def test_series_differ_without_colour(self):
        names = [f"series {i}" for i in range(8)]
        root = ElementTree.fromstring(
            dots_svg("t", "m", "ms", [Row("r", {name: Sample(1.0) for name in names})])
        )
        assert len({path.get("d") for path in root.iterfind(".//svg:path", SVG)}) == 8

    def test_curves_have_a_line_for_each_series_of_each_panel(self):
        panel = Panel(
            "p", "T", "ms", {"a": {512: Sample(1.0), 1024: Sample(2.0, 1.5, 3.0)}, "b": {512: Sample(3.0)}}
        )
        root = ElementTree.fromstring(curves_svg("t", "m", [panel, panel, panel]))
        assert len(root.findall(".//svg:polyline", SVG)) == 6

    def test_each_explorer_has_a_row_with_a_mark_for_each_way(self):
        results = [
            Redraw("a", "page", 1.0, 2.0, 4),
            Redraw("a", "python", 10.0, 12.0, 4),
            Redraw("b", "page", 1.5, 3.0, 4),
        ]
        svg = explorers_svg(results, this_machine())
        assert all(label in svg for label in ("a, page: 1<", "a, python: 10<", "b, page: 1.5<"))


class TestCommand:
    @pytest.mark.parametrize("command", ["layer", "curve", "gpu"])
    def test_quick_prints_a_table_and_writes_json_and_plot(self, command, tmp_path):
        path, plot = tmp_path / "result.json", tmp_path / "result.svg"
        options = [command, "--quick", "--json", str(path), "--plot", str(plot)]
        result = CliRunner().invoke(bench, options)
        assert result.exit_code == 0, result.output
        rows = [
            line.split()[0]
            for line in result.output.splitlines()
            if re.match(r"(inference|training)\s", line)
        ]
        document = json.loads(path.read_text())
        assert document["machine"]["torch"] == torch.__version__
        assert document["machine"]["processor"] in result.output.splitlines()[0]
        assert [r["mode"] for r in document["results"]] == rows
        assert {"roofline_share", "of_dense", "ours", "others", "beside"} <= document["results"][0].keys()
        labels = [title.text for title in ElementTree.parse(plot).iterfind(".//svg:path/svg:title", SVG)]
        assert sum("moe_edu" in label for label in labels) > len(rows)

    def test_compares_with_transformers(self):
        result = CliRunner().invoke(bench, ["layer", "--quick"])
        assert sum(line.strip().startswith(REFERENCE) for line in result.output.splitlines()) == 2

    def test_says_what_to_do_without_transformers(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "transformers", None)
        result = CliRunner().invoke(bench, ["layer", "--quick"])
        assert result.exit_code == 0, result.output
        assert "pip install transformers==4.57.6" in result.output

    @pytest.mark.parametrize("text", ["", "0", "8,x", "8,,9"])
    def test_refuses_bad_sizes(self, text):
        result = CliRunner().invoke(bench, ["layer", "--tokens", text])
        assert result.exit_code == 2
        assert "positive whole numbers" in result.output

    @pytest.mark.parametrize("option", ["--json", "--plot"])
    def test_refuses_a_missing_folder_before_it_measures(self, option):
        result = CliRunner().invoke(bench, ["layer", "--quick", option, "nowhere/file.svg"])
        assert result.exit_code == 2
        assert "there is no folder nowhere: create it first" in result.output
        assert "ms" not in result.output

    def test_refuses_another_kind_of_picture(self):
        result = CliRunner().invoke(bench, ["curve", "--quick", "--plot", "curve.png"])
        assert result.exit_code == 2
        assert "its name must end in .svg" in result.output

    def test_the_explorers_command_draws_its_results(self, monkeypatch, tmp_path):
        def measure(browser, names, presses):
            yield from (Redraw(name, "page", 1.0, 2.0, presses) for name in names)

        monkeypatch.setattr(explorers_bench, "open_browser", contextlib.nullcontext)
        monkeypatch.setattr(explorers_bench, "measure_in_page", measure)
        plot = tmp_path / "explorers.svg"
        result = CliRunner().invoke(
            bench, ["explorers", "--only", "budget", "--no-python", "--plot", str(plot)]
        )
        assert result.exit_code == 0, result.output
        assert "budget, page: 1<" in plot.read_text("utf-8")

    def test_explorers_say_what_is_missing_in_one_line(self, monkeypatch):
        monkeypatch.setattr("moe_edu.system.browser.find_browser", lambda: "/usr/bin/chromium")
        monkeypatch.setitem(sys.modules, "playwright.sync_api", None)
        result = CliRunner().invoke(bench, ["explorers", "--only", "budget", "--no-python"])
        assert result.exit_code == 1
        assert result.output.splitlines()[-1].startswith(
            "Error: Playwright, which controls the browser, is missing"
        )

    def test_gpu_refuses_in_one_line_without_one(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        result = CliRunner().invoke(bench, ["gpu"])
        assert result.exit_code == 1
        assert result.output.startswith("Error: this PyTorch finds no NVIDIA GPU")
        assert result.output.count("\n") == 1


class TestModelBench:
    def test_quick_run_prints_and_writes(self, tmp_path):
        path, plot = tmp_path / "model.json", tmp_path / "model.svg"
        options = ["model", "--quick", "--processes", "1", "--json", str(path), "--plot", str(plot)]
        outcome = CliRunner().invoke(bench, options)
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
        assert all(
            label in plot.read_text("utf-8") for label in ("training, moe_edu:", "training, transformers:")
        )

    def test_a_model_that_disagrees_is_not_timed(self, monkeypatch):
        """A speed-up with different results does not count."""
        make = model_bench.make_reference

        def make_other(model):
            reference = make(model)
            with torch.no_grad():
                reference.model.decoder.layer_norm.bias.add_(0.1)
            return reference

        monkeypatch.setattr(model_bench, "make_reference", make_other)
        with pytest.raises(ArithmeticError, match="differ"):
            model_bench.run_model_bench(batches=1, sentences=2, beams=1, repeats=1, processes=1, quick=True)
