"""`moe-edu bench`: what a reader can measure on their own machine."""

from __future__ import annotations

from pathlib import Path

import click
import torch

from moe_edu.bench.contenders import LayerSize, reference_is_here
from moe_edu.bench.explorers import explorers
from moe_edu.bench.layer import MODES, run_layer_bench
from moe_edu.bench.memory import can_measure_memory
from moe_edu.bench.report import (
    format_header,
    format_machine,
    format_row,
    format_summary,
    this_machine,
    write_json,
)


@click.group()
def bench() -> None:
    """Measure speed and memory side by side."""


bench.add_command(explorers)


def _positive_integers(_: click.Context, parameter: click.Parameter, text: str) -> tuple[int, ...]:
    try:
        values = tuple(int(part) for part in text.split(","))
    except ValueError:
        values = ()
    if not values or min(values) < 1:
        raise click.BadParameter(
            f"{text!r}: give positive whole numbers with commas between, like 8,32", param=parameter
        )
    return values


@bench.command()
@click.option(
    "--tokens", default="512,4096", show_default=True, callback=_positive_integers, help="T, comma-separated."
)
@click.option(
    "--experts",
    default="8,32,128",
    show_default=True,
    callback=_positive_integers,
    help="E, comma-separated.",
)
@click.option("--d-model", type=click.IntRange(1), default=512, show_default=True, help="D.")
@click.option("--ffn-dim", type=click.IntRange(1), default=2048, show_default=True, help="F.")
@click.option("--mode", type=click.Choice(("both", *MODES)), default="both", show_default=True)
@click.option("--dtype", type=click.Choice(("float32", "bfloat16")), default="float32", show_default=True)
@click.option(
    "--repeats", type=click.IntRange(1), default=7, show_default=True, help="Timed calls of each contender."
)
@click.option(
    "--threads", type=click.IntRange(1), default=None, help="CPU threads; by default PyTorch's choice."
)
@click.option(
    "--memory/--no-memory", default=True, show_default=True, help="Also measure peak memory (Linux)."
)
@click.option(
    "--output", type=click.Path(path_type=Path, dir_okay=False), default=None, help="Write JSON here."
)
@click.option(
    "--quick", is_flag=True, help="One tiny size, one repeat: shows that it works, measures nothing."
)
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
    output: Path | None,
    quick: bool,
) -> None:
    """Compare one sparse layer with transformers' NLLB-MoE layer and with the machine's limits.

    Every contender has the same weights, input and routing, and is checked against a float64 loop before it is timed.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    sizes = [LayerSize(T, E, d_model, ffn_dim) for E in experts for T in tokens]
    if quick:
        sizes, repeats, memory = [LayerSize(64, 4, 32, 64)], 1, False
    machine = this_machine()
    click.echo(format_machine(machine))
    advice = reference_is_here()
    if advice is not None:
        click.echo(f"without the reference: {advice}")
    if memory and not can_measure_memory():
        click.echo("without peak memory: it can be measured on Linux only")
    click.echo(format_header())
    results = []
    for result in run_layer_bench(
        sizes,
        modes=tuple(m for m in MODES if mode in ("both", m)),
        repeats=repeats,
        dtype=getattr(torch, dtype),
        memory=memory,
    ):
        click.echo(format_row(result))
        results.append(result)
        if output is not None:
            write_json(output, machine, results)
    click.echo(format_summary(results))


@bench.command()
@click.option(
    "--batches", type=click.IntRange(1), default=10, show_default=True, help="Training batches a timed call."
)
@click.option(
    "--sentences", type=click.IntRange(1), default=64, show_default=True, help="Sentences to translate."
)
@click.option("--beams", type=click.IntRange(1), default=4, show_default=True)
@click.option(
    "--repeats", type=click.IntRange(1), default=5, show_default=True, help="Timed calls of each contender."
)
@click.option(
    "--threads", type=click.IntRange(1), default=None, help="CPU threads; by default PyTorch's choice."
)
@click.option(
    "--processes",
    type=click.IntRange(1),
    default=None,
    help="moe_edu's training processes, as in moe-edu train.",
)
@click.option(
    "--output", type=click.Path(path_type=Path, dir_okay=False), default=None, help="Write JSON here."
)
@click.option(
    "--quick", is_flag=True, help="A tiny model, one repeat: shows that it works, measures nothing."
)
def model(
    batches: int,
    sentences: int,
    beams: int,
    repeats: int,
    threads: int | None,
    processes: int | None,
    output: Path | None,
    quick: bool,
) -> None:
    """Compare training and generation of the small translator with the same model in transformers.

    Both have the same weights, batches and optimizer; logits and generated ids are compared before anything is timed.
    """
    # Brings in the corpus and its tools, which no other command here needs.
    from moe_edu.bench.model import format_model_result, run_model_bench, write_model_json

    advice = reference_is_here()
    if advice is not None:
        raise click.ClickException(advice)
    if threads is not None:
        torch.set_num_threads(threads)
    machine = this_machine()
    click.echo(format_machine(machine))
    result = run_model_bench(
        batches=batches, sentences=sentences, beams=beams, repeats=repeats, processes=processes, quick=quick
    )
    click.echo(format_model_result(result))
    if output is not None:
        write_model_json(output, machine, result)
