"""`moe-edu bench`: what a reader can measure on their own machine."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import product
from pathlib import Path

import click
import torch

from moe_edu.bench.contenders import LayerSize
from moe_edu.bench.curve import curve_sizes, format_curve, make_curves
from moe_edu.bench.explorers import explorers
from moe_edu.bench.gpu import DTYPES, Check, gpu_contenders, gpu_sizes, run_checks
from moe_edu.bench.layer import LIBRARIES, MODES, Factory, LayerResult, Mode, explain_missing, run_layer_bench
from moe_edu.bench.libraries import reference_is_here
from moe_edu.bench.memory import can_measure_memory
from moe_edu.bench.options import (
    d_model_option,
    dtype_option,
    ffn_dim_option,
    integers_option,
    json_option,
    memory_option,
    mode_option,
    plot_option,
    quick_option,
    repeats_option,
    threads_option,
)
from moe_edu.bench.pictures import curve_svg, layer_svg, model_svg
from moe_edu.bench.plot import write_plot
from moe_edu.bench.report import (
    format_header,
    format_machine,
    format_missing,
    format_row,
    format_summary,
    layer_result_to_dict,
    write_json,
)
from moe_edu.system.machine import Machine, this_machine


@click.group()
def bench() -> None:
    """Measure speed and memory side by side."""


bench.add_command(explorers)


@bench.command()
@integers_option("--tokens", "512,4096", "T")
@integers_option("--experts", "8,32,128", "E")
@d_model_option
@ffn_dim_option
@mode_option
@dtype_option
@repeats_option(7)
@threads_option
@memory_option
@json_option
@plot_option
@quick_option
def layer(
    tokens: tuple[int, ...],
    experts: tuple[int, ...],
    d_model: int,
    ffn_dim: int,
    mode: str,
    dtype: str,
    repeats: int,
    threads: int | None,
    memory: bool,
    json_path: Path | None,
    plot_path: Path | None,
    quick: bool,
) -> None:
    """Compare one sparse layer with those of other libraries and with the machine's limits.

    Every contender has the same weights, input and routing, and is checked against a float64 loop before it is timed:
    transformers 4.57.6's NLLB-MoE layer, transformers 5's experts and st-moe-pytorch, each if it is installed.
    """
    sizes = [LayerSize(T, E, d_model, ffn_dim) for E in experts for T in tokens]
    if quick:
        sizes, repeats, memory = [LayerSize(64, 4, 32, 64)], 1, False
    machine = _begin(threads, memory)
    missing = explain_missing(LIBRARIES, getattr(torch, dtype), "cpu")
    if missing:
        click.echo(format_missing(missing))
    contenders = {name: make for name, make in LIBRARIES.items() if name not in missing}
    results = _measure(sizes, mode, dtype, contenders, repeats, memory, machine, json_path)
    click.echo(format_summary(results))
    if plot_path is not None:
        write_plot(plot_path, layer_svg(results, machine))


@bench.command()
@integers_option("--experts", "8,16,32,64,128", "E")
@integers_option("--tokens", "512,1024,2048,4096,8192", "T")
@click.option("--at-tokens", type=click.IntRange(1), default=4096, show_default=True, help="T while E grows.")
@click.option("--at-experts", type=click.IntRange(1), default=32, show_default=True, help="E while T grows.")
@d_model_option
@ffn_dim_option
@mode_option
@dtype_option
@repeats_option(7)
@threads_option
@memory_option
@json_option
@plot_option
@quick_option
def curve(
    experts: tuple[int, ...],
    tokens: tuple[int, ...],
    at_tokens: int,
    at_experts: int,
    d_model: int,
    ffn_dim: int,
    mode: str,
    dtype: str,
    repeats: int,
    threads: int | None,
    memory: bool,
    json_path: Path | None,
    plot_path: Path | None,
    quick: bool,
) -> None:
    """Measure what one sparse layer costs as its experts grow, and as its tokens do.

    The dense network with the same active work and the roofline are shown for comparison.
    """
    if quick:
        experts, tokens, at_experts, at_tokens, d_model, ffn_dim = (2, 4), (32, 64), 4, 64, 32, 64
        repeats, memory = 1, False
    sizes = curve_sizes(experts, tokens, at_experts, at_tokens, d_model, ffn_dim)
    machine = _begin(threads, memory)
    results = _measure(sizes, mode, dtype, {}, repeats, memory, machine, json_path)
    click.echo(format_summary(results))
    curves = make_curves(results, at_experts, at_tokens)
    for one in curves:
        click.echo(format_curve(one))
    if plot_path is not None:
        write_plot(plot_path, curve_svg(curves, machine))


@bench.command()
@mode_option
@click.option(
    "--dtype", type=click.Choice(("both", "bfloat16", "float16")), default="both", show_default=True
)
@repeats_option(20)
@memory_option
@json_option
@plot_option
@quick_option
def gpu(
    mode: str,
    dtype: str,
    repeats: int,
    memory: bool,
    json_path: Path | None,
    plot_path: Path | None,
    quick: bool,
) -> None:
    """Compare the layer's back ends on an NVIDIA GPU with the dense layer that does the same work.

    Inference and training, bf16 and fp16, at T=16384, D=1024 and 2048, F=4D, E=8, 32 and 128, timed by CUDA events.
    Then three promises are checked: no wait for the GPU, one graph in torch.compile for any T, and CUDA graphs.
    """
    device, compiler, sizes = "cuda", "inductor", gpu_sizes()
    if quick:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        compiler, sizes, repeats = "eager", [LayerSize(64, 4, 32, 64, tight=True)], 1
    elif not torch.cuda.is_available():
        raise click.ClickException("this PyTorch finds no NVIDIA GPU; --quick tries the benchmark on the CPU")
    dtypes = DTYPES if dtype == "both" else (getattr(torch, dtype),)
    machine = _begin(None, memory and device == "cuda")
    contenders = gpu_contenders(compiler)
    missing = explain_missing(contenders, DTYPES[0], device)
    if missing:
        click.echo(format_missing(missing))
    contenders = {name: make for name, make in contenders.items() if name not in missing}
    click.echo(format_header())
    results: list[LayerResult] = []
    checks: list[Check] = []

    def save() -> None:
        if json_path is not None:
            rows = [layer_result_to_dict(result) for result in results]
            write_json(json_path, machine, results=rows, checks=[check._asdict() for check in checks])

    for size, one_dtype, one_mode in product(sizes, dtypes, _modes(mode)):
        try:
            (result,) = run_layer_bench(
                [size],
                contenders=contenders,
                modes=(one_mode,),
                repeats=repeats,
                dtype=one_dtype,
                device=device,
                memory=memory and device == "cuda",
                seconds_each=10.0,
            )
        except torch.OutOfMemoryError:
            click.echo(
                f"{one_mode} {one_dtype} E={size.experts} D={size.d_model}: too large for this GPU's memory"
            )
            torch.cuda.empty_cache()
            continue
        click.echo(format_row(result))
        results.append(result)
        save()
    click.echo(format_summary(results))
    for one_dtype in dtypes:
        for check in run_checks(sizes[0], one_dtype, device, compiler):
            click.echo(f"{check.dtype:9} {check.backend:7} {check.promise:28} {check.outcome}")
            checks.append(check)
    save()
    if plot_path is not None and results:
        write_plot(plot_path, layer_svg(results, machine))


@bench.command()
@click.option(
    "--batches",
    type=click.IntRange(1),
    default=10,
    show_default=True,
    help="Training batches per timed call.",
)
@click.option(
    "--sentences", type=click.IntRange(1), default=256, show_default=True, help="Sentences to translate."
)
@click.option("--beams", type=click.IntRange(1), default=4, show_default=True)
@repeats_option(5)
@threads_option
@click.option(
    "--processes",
    type=click.IntRange(1),
    default=None,
    help="Processes of moe_edu, 1 or 2; by default 2 if there are at least 2 cores.",
)
@json_option
@plot_option
@quick_option
def model(
    batches: int,
    sentences: int,
    beams: int,
    repeats: int,
    threads: int | None,
    processes: int | None,
    json_path: Path | None,
    plot_path: Path | None,
    quick: bool,
) -> None:
    """Compare training and generation by the small translator with the same model in transformers.

    Both have the same weights, batches and optimizer; logits and generated ids are compared before anything is timed.
    """
    # Imports the corpus and its tools, which no other command here needs.
    from moe_edu.bench.model import format_model_result, run_model_bench, write_model_json

    advice = reference_is_here()
    if advice is not None:
        raise click.ClickException(advice)
    machine = _begin(threads, False)
    result = run_model_bench(
        batches=batches, sentences=sentences, beams=beams, repeats=repeats, processes=processes, quick=quick
    )
    click.echo(format_model_result(result))
    if json_path is not None:
        write_model_json(json_path, machine, result)
    if plot_path is not None:
        write_plot(plot_path, model_svg(result, machine))


def _begin(threads: int | None, memory: bool) -> Machine:
    """Set the threads; print what machine this is and what cannot be measured on it."""
    if threads is not None:
        torch.set_num_threads(threads)
    machine = this_machine()
    click.echo(format_machine(machine))
    if memory and not can_measure_memory():
        click.echo("peak memory is left out: it can be measured only on Linux")
    return machine


def _modes(mode: str) -> tuple[Mode, ...]:
    return tuple(one for one in MODES if mode in ("both", one))


def _measure(
    sizes: Iterable[LayerSize],
    mode: str,
    dtype: str,
    contenders: Mapping[str, Factory],
    repeats: int,
    memory: bool,
    machine: Machine,
    json_path: Path | None,
) -> list[LayerResult]:
    """Print each result as soon as it is measured, and write all so far: large sizes take minutes."""
    click.echo(format_header())
    results = []
    for result in run_layer_bench(
        sizes,
        contenders=contenders,
        modes=_modes(mode),
        repeats=repeats,
        dtype=getattr(torch, dtype),
        memory=memory,
    ):
        click.echo(format_row(result))
        results.append(result)
        if json_path is not None:
            write_json(json_path, machine, results=[layer_result_to_dict(one) for one in results])
    return results
