"""Colab and Kaggle: which of them runs this notebook, and which of its menus a reader needs."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from moe_edu.system.requirements import Lack


class Service(NamedTuple):
    """A place that runs notebooks.

    Attributes:
        name: what its readers call it.
        gpu_menu: where they choose a GPU.
        version_menu: where they choose the newest PyTorch.
    """

    name: str
    gpu_menu: str
    version_menu: str


COLAB = Service(
    "Colab",
    "Runtime > Change runtime type > T4 GPU",
    "Runtime > Change runtime type > Runtime version > Latest",
)
KAGGLE = Service(
    "Kaggle",
    "Settings > Accelerator > GPU T4",
    "Settings > Environment preferences > Always use latest environment",
)


def find_service(environ: Mapping[str, str] = os.environ) -> Service | None:
    """The service that runs this notebook, by the variable that each sets; None elsewhere."""
    if "KAGGLE_KERNEL_RUN_TYPE" in environ:  # first: Kaggle's image is made from Colab's
        return KAGGLE
    return COLAB if "COLAB_RELEASE_TAG" in environ else None


def advise(service: Service | None, lacks: Iterable[Lack], has_gpu: bool) -> list[str]:
    """What a reader should know before the lesson begins, one line each; empty if all is well.

    Args:
        service: where the notebook runs.
        lacks: packages that are older than the lessons need.
        has_gpu: whether PyTorch can use one.
    """
    lines = []
    for name, needed, found in lacks:
        fix = f"run %pip install -U {name} in a cell, then restart the kernel"
        if name == "torch":
            fix = service.version_menu if service else "install a newer PyTorch"
        lines.append(f"{name} {found} is too old, {needed} or newer is needed: {fix}.")
    if service is not None and not has_gpu:
        lines.append(
            f"No GPU here, and no lesson needs one. To get one: {service.gpu_menu}, then run all cells."
        )
    return lines
