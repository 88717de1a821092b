"""Run the pocket dictionary over experts, rates, capacities and controls, one JSON file a run:

python -m moe_edu.experiments.dictionary_sweep run --out runs        # resumes: what is there is not run again
python -m moe_edu.experiments.dictionary_sweep collect runs --to results.json
python -m moe_edu.experiments.dictionary_sweep table                 # the results that ship
"""

from __future__ import annotations

import json
import math
import platform
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
from tqdm.auto import tqdm

import moe_edu
from moe_edu.experiments.dictionary import DictionarySettings, run
from moe_edu.runs import write_json

RESULTS_FILE = "dictionary.json"
BASE = DictionarySettings()

# Group -> cell -> (settings, seeds), the most important first. A cell is run on seeds 0, 1, ...
Plan = Mapping[str, Mapping[str, tuple[DictionarySettings, int]]]
PLAN: Plan = {
    "experts": {f"experts-{e}": (replace(BASE, experts=e), 5) for e in (1, 2, 4, 8, 16, 32)},
    # The dense twin with what the 32 experts take besides: their processor time, or the router's multiplications
    # (32 * 24 a character and layer, as 16 more hidden units have).
    "controls": {
        "dense-equal-time": (replace(BASE, experts=1, steps=3000), 3),
        "dense-router-work": (replace(BASE, experts=1, dense_width=64), 3),
    },
    # As many feed-forward weights as 16 experts, all of them active; at its own rate.
    "wide": {
        f"dense-wide-rate-{rate:g}": (replace(BASE, experts=1, dense_width=384, learning_rate=rate), 3)
        for rate in (0.01, 0.02, 0.04)
    },
    "rate": {
        f"experts-{e}-rate-{rate:g}": (replace(BASE, experts=e, learning_rate=rate), 3)
        for rate in (0.005, 0.04, 0.01)
        for e in (1, 16)
    },
    "capacity": {
        f"experts-16-capacity-{c:g}": (replace(BASE, experts=16, capacity_factor=c), 3) for c in (0.5, 1.0)
    },
    "balance": {"experts-16-balance-0": (replace(BASE, experts=16, balance=0.0), 3)},
}
MEASURES = ("recall", "test", "test_new_spelling", "cpu_seconds")


class Summary(NamedTuple):
    """Mean and sample standard deviation over `n` seeds; NaN where there is one run, which has no spread."""

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


def load_results() -> dict[str, Any]:
    """The results that ship: `{"command", "base", "runs": [...]}`, each run as `dictionary.run` returns it, with its
    `group`, `cell`, `versions` and `threads`. Cells of the plan that were not run are not in it."""
    text = files("moe_edu.experiments").joinpath("results", RESULTS_FILE).read_text(encoding="utf-8")
    results: dict[str, Any] = json.loads(text)
    return results


def by_cell(runs: Iterable[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """The runs of each cell, in the order in which they come."""
    cells: dict[str, list[Mapping[str, Any]]] = {}
    for result in runs:
        cells.setdefault(result["cell"], []).append(result)
    return cells


def format_table(runs: Iterable[Mapping[str, Any]]) -> str:
    """One line a cell: parameters, and mean and deviation of every measure over the seeds."""
    lines = [f"{'cell':26}{'n':>3}{'parameters':>12}{'active':>9}" + "".join(f"{m:>20}" for m in MEASURES)]
    for cell, results in by_cell(runs).items():
        line = f"{cell:26}{len(results):3}{results[0]['parameters']:12,}{results[0]['active_parameters']:9,}"
        for measure in MEASURES:
            digits = 1 if measure == "cpu_seconds" else 3
            line += f"{summarize(result[measure] for result in results).text(digits):>20}"
        lines.append(line)
    return "\n".join(lines)


@click.group()
def main() -> None:
    """The pocket dictionary, over and over."""


@main.command("run")
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="Folder of results."
)
@click.option(
    "--group", "groups", type=click.Choice(list(PLAN)), multiple=True, help="Default: all, in order."
)
@click.option("--cell", "cells", multiple=True, help="Only these cells, such as experts-8.")
@click.option("--seeds", type=click.IntRange(1), default=None, help="Seeds a cell. Default: the plan's.")
@click.option("--steps", type=click.IntRange(1), default=None, help="Shorter runs, to try it out.")
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="CPU threads.")
def run_command(
    out: Path,
    groups: tuple[str, ...],
    cells: tuple[str, ...],
    seeds: int | None,
    steps: int | None,
    threads: int,
) -> None:
    """Run what is missing in OUT, seed by seed, so that a stopped sweep has covered every cell of a group."""
    torch.set_num_threads(threads)
    known = [cell for plan in PLAN.values() for cell in plan]
    unknown = sorted(set(cells) - set(known))
    if unknown:
        raise click.BadParameter(f"no cell {unknown[0]!r}; there are {', '.join(known)}", param_hint="--cell")
    out.mkdir(parents=True, exist_ok=True)
    missing = []
    for group, plan in PLAN.items():
        if groups and group not in groups:
            continue
        chosen = {cell: job for cell, job in plan.items() if not cells or cell in cells}
        for seed in range(max([seeds or n for _, n in chosen.values()], default=0)):
            for cell, (settings, n) in chosen.items():
                path = out / f"{cell}-seed-{seed}.json"
                if seed < (seeds or n) and not path.exists():
                    job = replace(settings, seed=seed, steps=steps or settings.steps)
                    missing.append((group, cell, job, path))
    for group, cell, settings, path in tqdm(missing, unit="run"):
        result = run(settings, show_progress=True)
        write_json(path, {"group": group, "cell": cell, "versions": versions(), "threads": threads, **result})
        tqdm.write(f"{path.stem}: recall {result['recall']:.3f}, test {result['test']:.3f}")


@main.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--to", type=click.Path(path_type=Path, dir_okay=False), required=True)
def collect(folder: Path, to: Path) -> None:
    """Put the results in FOLDER into one file, in the order of the plan, and print their table."""
    order = {(group, cell): i for i, (group, cell) in enumerate((g, c) for g, p in PLAN.items() for c in p)}
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*-seed-*.json")]
    runs.sort(key=lambda result: (order[result["group"], result["cell"]], result["settings"]["seed"]))
    command = "python -m moe_edu.experiments.dictionary_sweep run --out runs"
    write_json(to, {"command": command, "base": asdict(BASE), "runs": [rounded(result) for result in runs]})
    click.echo(format_table(runs))


@main.command()
def table() -> None:
    """Print the table of the results that ship."""
    click.echo(format_table(load_results()["runs"]))


def versions() -> dict[str, str]:
    """What a run was computed with."""
    return {"moe_edu": moe_edu.__version__, "torch": torch.__version__, "python": platform.python_version()}


def rounded(value: Any) -> Any:
    """JSON values with floats of at most five decimals: more than five seeds can tell apart."""
    if isinstance(value, float):
        return round(value, 5)
    if isinstance(value, Mapping):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list) else value


if __name__ == "__main__":
    main()
