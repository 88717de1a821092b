"""Options that the benchmark's commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from moe_edu.bench.layer import MODES

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def integers_option(name: str, default: str, help: str) -> Decorator:
    """Positive whole numbers, comma-separated."""
    return click.option(
        name, default=default, show_default=True, callback=_parse_integers, help=f"{help}, comma-separated."
    )


def repeats_option(default: int) -> Decorator:
    return click.option(
        "--repeats",
        type=click.IntRange(1),
        default=default,
        show_default=True,
        help="Timed calls of each contender.",
    )


def _parse_integers(_: click.Context, parameter: click.Parameter, text: str) -> tuple[int, ...]:
    try:
        values = tuple(int(part) for part in text.split(","))
    except ValueError:
        values = ()
    if not values or min(values) < 1:
        raise click.BadParameter(
            f"{text!r}: give positive whole numbers separated by commas, such as 8,32", param=parameter
        )
    return values


def _require_folder(_: click.Context, parameter: click.Parameter, path: Path | None) -> Path | None:
    """Check before minutes of measuring, not after."""
    if path is not None and not path.parent.is_dir():
        raise click.BadParameter(f"there is no folder {path.parent}: create it first", param=parameter)
    return path


def _require_svg(context: click.Context, parameter: click.Parameter, path: Path | None) -> Path | None:
    _require_folder(context, parameter, path)
    if path is not None and path.suffix != ".svg":
        raise click.BadParameter(
            f"{path.name}: the plot is an SVG picture; its name must end in .svg", param=parameter
        )
    return path


_FILE = click.Path(path_type=Path, dir_okay=False)

d_model_option = click.option("--d-model", type=click.IntRange(1), default=512, show_default=True, help="D.")
ffn_dim_option = click.option("--ffn-dim", type=click.IntRange(1), default=2048, show_default=True, help="F.")
mode_option = click.option("--mode", type=click.Choice(("both", *MODES)), default="both", show_default=True)
dtype_option = click.option(
    "--dtype", type=click.Choice(("float32", "bfloat16")), default="float32", show_default=True
)
threads_option = click.option(
    "--threads", type=click.IntRange(1), default=None, help="CPU threads; PyTorch chooses by default."
)
memory_option = click.option(
    "--memory/--no-memory", default=True, show_default=True, help="Also measure peak memory."
)
json_option = click.option(
    "--json",
    "json_path",
    type=_FILE,
    default=None,
    callback=_require_folder,
    help="Write every number to this file.",
)
plot_option = click.option(
    "--plot",
    "plot_path",
    type=_FILE,
    default=None,
    callback=_require_svg,
    help="Draw the results into this SVG file.",
)
quick_option = click.option(
    "--quick",
    is_flag=True,
    help="Tiny sizes and one repeat: a test that the benchmark runs, not a measurement.",
)
