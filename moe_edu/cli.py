"""The command line, `moe-edu lab | lessons | env | train | translate | bench`; each imports its part when it runs."""

from __future__ import annotations

import dataclasses
import io
import os
import re
import subprocess
import sys
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from moe_edu import __version__
from moe_edu.config import MoEConfig
from moe_edu.training.settings import TrainingSettings

# Set by the corpus and the tokenizer, not by hand.
_DERIVED = {"vocab_size", "pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"}


class _Commands(click.Group):
    """The commands of this file, and `bench`, which has its own file."""

    def list_commands(self, context: click.Context) -> list[str]:
        return sorted([*super().list_commands(context), "bench"])

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name != "bench":
            return super().get_command(context, name)
        from moe_edu.bench.command import bench

        return bench


@click.group(
    cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
)
@click.version_option(__version__, prog_name="moe-edu")
def main() -> None:
    """Learn the sparse Mixture-of-Experts encoder of NLLB-MoE."""


def fail_clearly(command: Callable[..., None]) -> Callable[..., None]:
    """Show an error that the user can fix as one line instead of a traceback."""

    def run(**options: Any) -> None:
        try:
            command(**options)
        except BrokenPipeError:  # the reader, such as `| head -1`, has closed the pipe: click ends silently
            raise
        except (ValueError, OSError, RuntimeError) as error:
            raise click.ClickException(str(error)) from error

    run.__doc__ = command.__doc__
    run.__name__ = command.__name__
    return run


def field_options(
    cls: type, group: str, skip: set[str]
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """One option per field of a dataclass; its default None means "not given", so that the dataclass's own applies."""
    hints = typing.get_type_hints(cls)
    # The docstring's list of fields: "name: description", perhaps over several lines.
    documented = dict(re.findall(r"^ {8}(\w+): (.+?)(?=^ {8}\w+: |^ *$)", cls.__doc__ or "", re.M | re.S))

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        for field in reversed(dataclasses.fields(cls)):
            if field.name not in skip:
                kind, is_list = _option_type(hints[field.name])
                option = "--" + field.name.replace("_", "-")
                if kind is bool:
                    option += f"/--no-{field.name.replace('_', '-')}"
                note = "Comma-separated, or all." if is_list else ""
                text = " ".join(documented.get(field.name, f"{group} {field.name}.").split())
                command = click.option(
                    option,
                    type=str if is_list else kind,
                    default=None,
                    help=f"{text[0].upper()}{text[1:]} {note}".strip(),
                )(command)
        return command

    return decorate


def _option_type(hint: Any) -> tuple[Any, bool]:
    """(click type, whether it is a list) of a field's annotation."""
    if isinstance(hint, types.UnionType):
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    if typing.get_origin(hint) is typing.Literal:
        return click.Choice(typing.get_args(hint)), False
    return (str, True) if typing.get_origin(hint) is tuple else (hint, False)


def given(options: dict[str, Any], cls: type) -> dict[str, Any]:
    """The given options that are fields of `cls`; comma-separated lists become tuples, "all" becomes None."""
    hints = typing.get_type_hints(cls)
    values = {}
    for field in dataclasses.fields(cls):
        value = options.get(field.name)
        if value is not None:
            is_list = _option_type(hints[field.name])[1]
            values[field.name] = _split_codes(value) if is_list else value
    return values


def _split_codes(text: str) -> tuple[str, ...] | None:
    return None if text == "all" else tuple(code.strip() for code in text.split(",") if code.strip())


@main.command()
@click.argument("notebook", default="00_start_here.ipynb")
@click.option(
    "--port", type=int, default=None, help="Port of the server; by default the first free one from 8888."
)
@click.option("--no-browser", is_flag=True, help="Print the address instead of opening it.")
@fail_clearly
def lab(notebook: str, port: int | None, no_browser: bool) -> None:
    """Open the lessons in JupyterLab; outside a clone, open a copy of them in ./moe_edu_lessons."""
    from moe_edu.system.lab import lab_command
    from moe_edu.system.notebooks import COPY, copy_lessons, find_clone
    from moe_edu.system.requirements import explain_missing

    advice = explain_missing("jupyterlab")
    if advice is not None:
        raise click.ClickException(advice)
    folder = find_clone()
    if folder is None:
        folder = Path.cwd() / COPY
        click.echo(
            f"the lessons are in {folder}, which keeps your changes ({copy_lessons(folder)[0]} files copied)"
        )
    if not (folder / notebook).is_file():
        names = ", ".join(sorted(path.name for path in folder.glob("*.ipynb")))
        raise click.ClickException(f"there is no lesson {notebook}; the lessons are {names}")
    command = [*lab_command(), f"--notebook-dir={folder}", f"--LabApp.default_url=/lab/tree/{notebook}"]
    command += [f"--port={port}"] if port else []
    command += ["--no-browser"] if no_browser else []
    # In a container the user is often root, whom JupyterLab refuses without this option.
    command += ["--allow-root"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    raise SystemExit(subprocess.call(command))


@main.command()
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False), default="moe_edu_lessons")
@fail_clearly
def lessons(folder: Path) -> None:
    """Copy the lessons to FOLDER, by default moe_edu_lessons; existing files are not replaced."""
    from moe_edu.system.notebooks import copy_lessons

    copied, kept = copy_lessons(folder)
    there = f"; {kept} were already there and are unchanged" if kept else ""
    click.echo(f"{copied} files copied to {folder}{there}")


@main.command()
def env() -> None:
    """Print what a bug report needs: versions, the machine, the device and the back end."""
    from moe_edu.environment import describe_environment

    click.echo(describe_environment())


@main.command()
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    help="Folder for the model, the log and result.json.",
)
@click.option(
    "--corpus",
    type=click.Path(path_type=Path, exists=True),
    default=None,
    help="A FLORES-200 folder or a TSV file; by default the corpus that ships.",
)
@click.option("--resume", is_flag=True, help="Continue the run in the folder.")
@click.option(
    "--store",
    type=click.Choice(("float32", "float16")),
    default="float32",
    show_default=True,
    help="Precision of the saved model; float16 halves the file.",
)
@click.option(
    "--threads",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="CPU threads, divided among the processes (at least one each); more are slower for a small model.",
)
@click.option(
    "--processes",
    type=click.IntRange(1),
    default=None,
    help="CPU processes: 1, or one per shard, which is the default if there are that many cores.",
)
@click.option(
    "--checkpoint-every",
    type=click.IntRange(1),
    default=200,
    show_default=True,
    help="Steps between saved states.",
)
@click.option(
    "--test-sentences",
    type=click.IntRange(0),
    default=None,
    help="Test on this many sentences; by default on all.",
)
@field_options(TrainingSettings, "Training", set())
@field_options(MoEConfig, "Model field", _DERIVED)
@fail_clearly
def train(
    out: Path,
    corpus: Path | None,
    resume: bool,
    store: str,
    threads: int,
    processes: int | None,
    checkpoint_every: int,
    test_sentences: int | None,
    **options: Any,
) -> None:
    """Train a translator.

    For example: moe-edu train --out runs/first --seconds 150 --seed 7
    """
    import torch

    from moe_edu.data import load_corpus, read_corpus
    from moe_edu.training.loop import train as run

    torch.set_num_threads(threads)
    result = run(
        load_corpus() if corpus is None else read_corpus(corpus),
        TrainingSettings(**given(options, TrainingSettings)),
        model_fields=given(options, MoEConfig),
        out=out,
        resume=resume,
        processes=processes,
        store_dtype=getattr(torch, store),
        test_sentences=test_sentences,
        checkpoint_every=checkpoint_every,
    )
    test = result.summary["test"]
    peak = result.summary["peak_rss_mb"]
    memory = "" if peak is None else f", at most {peak:.0f} MB of memory"
    click.echo(
        f"{result.summary['steps']} steps in {result.summary['seconds']} s, "
        f"{result.summary['tokens_per_second']} tokens/s{memory}\n"
        f"test: chrF++ {test['chrf']:.1f}, exact match {test['exact_match']:.3f}, {test['sentences']} sentences\n"
        f"model, log and result.json are in {out}"
    )


class _TextCommand(click.Command):
    """Explains what to do with a text that looks like an option."""

    def parse_args(self, context: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(context, args)
        except click.NoSuchOption as error:
            hint = 'A text that begins with - goes after --, as in: moe-edu translate -- "-5 km"'
            raise click.UsageError(f"{error.format_message()} {hint}", context) from error


@main.command(cls=_TextCommand)
@click.argument("text", nargs=-1)
@click.option("--to", default="eng_Latn", show_default=True, help="Target language, a FLORES-200 code.")
@click.option(
    "--from", "source", default="und", show_default=True, help="Source language; und lets the model find out."
)
@click.option(
    "--model", type=click.Path(path_type=Path), default=None, help="A folder that `moe-edu train` wrote."
)
@click.option("--beams", type=click.IntRange(1), default=4, show_default=True, help="1 is greedy search.")
@click.option(
    "--device", default="auto", show_default=True, help="auto takes an NVIDIA GPU where there is one."
)
@fail_clearly
def translate(
    text: tuple[str, ...], to: str, source: str, model: Path | None, beams: int, device: str
) -> None:
    """Translate each TEXT, or each line of the standard input."""
    from moe_edu.model.pretrained import load_pretrained

    translator = load_pretrained(model, device)
    if not text and not sys.stdin.isatty() and isinstance(sys.stdin, io.TextIOWrapper):
        # Without this, Windows would read piped text in an older code page.
        sys.stdin.reconfigure(encoding="utf-8-sig")
    for line in text or (line.rstrip("\n") for line in sys.stdin):
        click.echo(translator.translate(line, target=to, source=source, num_beams=beams))


if __name__ == "__main__":
    main()
