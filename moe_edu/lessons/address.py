"""Bring badges, links and install lines to the repository's one address: `python -m moe_edu.lessons.address [--check]`.

The address is `[project.urls]` Repository in pyproject.toml. Badges of a notebook open that notebook, all others the
first lesson. `--check` changes nothing and says which lines are stale.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import click

FILES = ("README.md", "CONTRIBUTING.md", "CITATION.cff", "docs/*.md", "notebooks/*.ipynb")
FIRST_LESSON = "notebooks/00_start_here.ipynb"
BRANCH = "main"

_NAME = r"([\w.-]+/[\w.-]*\w)"  # owner/repository
# Forms that occur only in this project's own lines; each has one group, the repository's name.
_OWN = (
    re.compile(rf"https://colab\.research\.google\.com/github/{_NAME}"),
    re.compile(rf"https://mybinder\.org/v2/gh/{_NAME}"),
    re.compile(rf"git\+https://github\.com/{_NAME}"),
    re.compile(rf'repository-code: "https://github\.com/{_NAME}"'),
)
_BADGE = re.compile(r"(\[!\[Open in (Colab|Binder)\]\([^)]*\)\])\([^)]*\)")


class StaleLine(NamedTuple):
    """A line that does not contain the repository's address; `file` relative to the root, `number` from 1."""

    file: str
    number: int
    found: str
    wanted: str


def read_name(pyproject: str) -> str:
    """The repository's "owner/name", from the text of pyproject.toml.

    Raises:
        ValueError: the address is not on GitHub, the only place where these Colab and Binder links look.
    """
    address = tomllib.loads(pyproject)["project"]["urls"]["Repository"]
    match = re.fullmatch(rf"https://github\.com/{_NAME}", address)
    if match is None:
        raise ValueError(
            f"[project.urls] Repository in pyproject.toml is {address!r}; it must be https://github.com/OWNER/NAME"
        )
    return match[1]


def badge_link(service: str, name: str, notebook: str) -> str:
    """The page of "Colab" or "Binder" that opens `notebook`, a path in the repository."""
    if service == "Colab":
        return f"https://colab.research.google.com/github/{name}/blob/{BRANCH}/{notebook}"
    return f"https://mybinder.org/v2/gh/{name}/{BRANCH}?urlpath=lab/tree/{notebook}"


def names_in(texts: Iterable[str], name: str) -> set[str]:
    """Every "owner/name" in this project's own lines, stale or not, and every other repository with the same name."""
    namesake = re.compile(rf"https://github\.com/([\w.-]+/{re.escape(name.split('/')[1])})(?![\w.-])")
    return {match[1] for text in texts for form in (*_OWN, namesake) for match in form.finditer(text)}


def rewrite(text: str, name: str, former: Iterable[str] = (), notebook: str = FIRST_LESSON) -> str:
    """`text` with every badge opening `notebook`, and every link to a `former` repository leading to `name`."""
    text = _BADGE.sub(lambda badge: f"{badge[1]}({badge_link(badge[2], name, notebook)})", text)
    for old in sorted(set(former) - {name}):
        # The name must end here: moe_edu is not moe_edu_site.
        text = re.sub(rf"(?<=[/:]){re.escape(old)}(?![\w-]|\.\w)", name, text)
    return text


def project_texts(root: Path) -> dict[str, str]:
    """The text of each file that may contain the address, by its path from `root`."""
    paths = sorted(path for pattern in FILES for path in root.glob(pattern))
    return {path.relative_to(root).as_posix(): path.read_text("utf-8") for path in paths}


def renewed(texts: dict[str, str], name: str) -> dict[str, str]:
    """`texts` with the repository's address in every place."""
    former = names_in(texts.values(), name)
    return {
        file: rewrite(text, name, former, file if file.endswith(".ipynb") else FIRST_LESSON)
        for file, text in texts.items()
    }


def stale_lines(texts: dict[str, str], name: str) -> list[StaleLine]:
    """Every line that `renewed` would change."""
    return [
        StaleLine(file, number, found.strip(), wanted.strip())
        for file, new in renewed(texts, name).items()
        for number, (found, wanted) in enumerate(
            zip(texts[file].splitlines(), new.splitlines(), strict=True), start=1
        )
        if found != wanted
    ]


@click.command(help=__doc__)
@click.option("--check", is_flag=True, help="Change nothing; fail if a line is stale.")
@click.option(
    "--root",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default=".",
    help="The checkout; by default the current folder.",
)
def main(check: bool, root: Path) -> None:
    pyproject = root / "pyproject.toml"
    if not pyproject.is_file():
        raise click.ClickException(f"no pyproject.toml in {root.resolve()}: run this in the checkout")
    try:
        name = read_name(pyproject.read_text("utf-8"))
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    texts = project_texts(root)
    stale = stale_lines(texts, name)
    for line in stale:
        click.echo(f"{line.file}:{line.number}: {line.found} -> {line.wanted}")
    if check and stale:
        raise click.ClickException(f"{len(stale)} stale lines: run python -m moe_edu.lessons.address")
    for file, text in renewed(texts, name).items():
        if text != texts[file]:
            (root / file).write_text(text, encoding="utf-8", newline="\n")
    click.echo(f"{len(texts)} files link to https://github.com/{name}")


if __name__ == "__main__":
    main()
