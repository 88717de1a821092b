"""A plan of training runs: every cell on several seeds, one JSON file per run, collected into the results that ship."""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
from torch import nn
from tqdm.auto import tqdm

from moe_edu.training.run import write_json

RESULTS = Path(__file__).parent / "results"

# Group -> cell -> (settings, seeds). A cell is run on seeds 0, 1, ...
Plan = Mapping[str, Mapping[str, tuple[Any, int]]]


@dataclass(frozen=True)
class Sweep:
    """What is run, and what is reported.

    Attributes:
        name: of the module that runs it, and of the JSON file with the results that ship.
        base: the settings that cells differ from, a dataclass with `steps` and `seed`.
        plan: the cells, most important first.
        run: settings -> result, in JSON values with `settings`, `parameters` and `active_parameters`.
        measures: the numbers of a result that the table shows, with their decimals.
    """

    name: str
    base: Any
    plan: Plan
    run: Callable[[Any], dict[str, Any]]
    measures: Mapping[str, int]

    @property
    def command(self) -> str:
        """The command that produces the results."""
        return f"python -m moe_edu.experiments.{self.name} run --out runs"


class Summary(NamedTuple):
    """Mean and sample standard deviation over `n` seeds; the deviation of a single run is NaN."""

    mean: float
    deviation: float
    n: int

    def text(self, digits: int = 3) -> str:
        """ "0.599 ± 0.006", or "0.690 (one run)"."""
        spread = "(one run)" if self.n == 1 else f"± {self.deviation:.{digits}f}"
        return f"{self.mean:.{digits}f} {spread}"


def summarize(values: Iterable[float]) -> Summary:
    numbers = list(values)
    deviation = statistics.stdev(numbers) if len(numbers) > 1 else math.nan
    return Summary(statistics.mean(numbers), deviation, len(numbers))


def load_results(name: str) -> dict[str, Any]:
    """The results of a sweep that ship: `{"command", "base", "runs": [...]}`.

    Each run is what the sweep's `run` returns, with its `group`, `cell`, `versions` and `threads`.
    """
    results: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return results


def by_cell(runs: Iterable[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """The runs of each cell, in the given order."""
    cells: dict[str, list[Mapping[str, Any]]] = {}
    for result in runs:
        cells.setdefault(result["cell"], []).append(result)
    return cells


def format_table(runs: Iterable[Mapping[str, Any]], measures: Mapping[str, int]) -> str:
    """One line per cell: parameters, and mean and deviation of every measure over the seeds."""
    lines = [f"{'cell':26}{'n':>3}{'parameters':>12}{'active':>10}" + "".join(f"{m:>20}" for m in measures)]
    for cell, results in by_cell(runs).items():
        line = f"{cell:26}{len(results):3}{results[0]['parameters']:12,}{results[0]['active_parameters']:10,}"
        for measure, digits in measures.items():
            line += f"{summarize(result[measure] for result in results).text(digits):>20}"
        lines.append(line)
    return "\n".join(lines)


def make_command(sweep: Sweep) -> click.Group:
    """The commands `run`, `collect` and `table` of a sweep."""

    @click.group(help=f"Run the sweep {sweep.name}, collect its results, or show those that ship.")
    def main() -> None:
        pass

    @main.command("run")
    @click.option(
        "--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="Folder of results."
    )
    @click.option(
        "--group",
        "groups",
        type=click.Choice(list(sweep.plan)),
        multiple=True,
        help="Default: all groups, in order.",
    )
    @click.option("--cell", "cells", multiple=True, help="Only these cells.")
    @click.option(
        "--seeds", type=click.IntRange(1), default=None, help="Seeds per cell. Default: the plan's."
    )
    @click.option("--steps", type=click.IntRange(1), default=None, help="Shorter runs, to try the sweep.")
    @click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="CPU threads.")
    def run_command(
        out: Path,
        groups: tuple[str, ...],
        cells: tuple[str, ...],
        seeds: int | None,
        steps: int | None,
        threads: int,
    ) -> None:
        """Run what is missing in OUT, seed by seed, so that a stopped sweep has covered all cells of a group alike."""
        torch.set_num_threads(threads)
        known = [cell for group in sweep.plan.values() for cell in group]
        unknown = sorted(set(cells) - set(known))
        if unknown:
            raise click.BadParameter(
                f"no cell {unknown[0]!r}; choose from {', '.join(known)}", param_hint="--cell"
            )
        out.mkdir(parents=True, exist_ok=True)
        for group, cell, settings, path in tqdm(
            missing_runs(sweep.plan, out, groups, cells, seeds, steps), unit="run"
        ):
            result = sweep.run(settings)
            write_json(
                path, {"group": group, "cell": cell, "versions": versions(), "threads": threads, **result}
            )
            shown = ", ".join(f"{m} {result[m]:.{digits}f}" for m, digits in sweep.measures.items())
            tqdm.write(f"{path.stem}: {shown}")

    @main.command()
    @click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
    @click.option("--to", type=click.Path(path_type=Path, dir_okay=False), required=True)
    def collect(folder: Path, to: Path) -> None:
        """Collect the results in FOLDER into one file, in the order of the plan, and print their table."""
        order = {cell: i for i, cell in enumerate(cell for group in sweep.plan.values() for cell in group)}
        runs = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*-seed-*.json")]
        found = Counter((run["cell"], run["settings"]["seed"]) for run in runs)
        if twice := [f"{cell} of seed {seed}" for (cell, seed), count in found.items() if count > 1]:
            raise click.ClickException(
                f"{folder} holds {', '.join(twice)} more than once: move away the runs that --steps shortened"
            )
        runs.sort(key=lambda result: (order[result["cell"]], result["settings"]["seed"]))
        write_json(
            to,
            {
                "command": sweep.command,
                "base": asdict(sweep.base),
                "runs": [rounded(result) for result in runs],
            },
        )
        click.echo(format_table(runs, sweep.measures))

    @main.command()
    def table() -> None:
        """Print the table of the results that ship."""
        click.echo(format_table(load_results(sweep.name)["runs"], sweep.measures))

    return main


def missing_runs(
    plan: Plan,
    out: Path,
    groups: Iterable[str] = (),
    cells: Iterable[str] = (),
    seeds: int | None = None,
    steps: int | None = None,
) -> list[tuple[str, str, Any, Path]]:
    """(group, cell, settings, file) of every run of the plan that is not in `out`; no groups or cells means all."""
    missing = []
    for group, jobs in plan.items():
        if groups and group not in groups:
            continue
        chosen = {cell: job for cell, job in jobs.items() if not cells or cell in cells}
        for seed in range(max([seeds or n for _, n in chosen.values()], default=0)):
            for cell, (settings, n) in chosen.items():
                tried_out = f"-steps-{steps}" if steps and steps != settings.steps else ""
                path = out / f"{cell}-seed-{seed}{tried_out}.json"
                if seed < (seeds or n) and not path.exists():
                    job = replace(settings, seed=seed, steps=steps or settings.steps)
                    missing.append((group, cell, job, path))
    return missing


def count_parameters(model: nn.Module, experts: int) -> tuple[int, int]:
    """(all, active): `active` excludes the experts that a token does not choose."""
    total = sum(parameter.numel() for parameter in model.parameters())
    in_experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    return total, total - in_experts * max(experts - 2, 0) // experts


def versions() -> dict[str, str]:
    """The versions that a run was computed with."""
    return {
        "moe_edu": importlib.metadata.version("moe-edu"),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def rounded(value: Any) -> Any:
    """JSON values with floats of at most five decimals: the seeds differ by more."""
    if isinstance(value, float):
        return round(value, 5)
    if isinstance(value, Mapping):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list) else value
