"""Weights in and out: Hugging Face's names, and safetensors files.

`transformers` keeps each expert as a module of its own; here all experts of a layer are stacked. One table of views,
`hf_tensors`, maps one form onto the other in both directions without a copy.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from moe_edu.config import MoEConfig

_EXPERT_TENSORS = {"w1": "fc1.weight", "b1": "fc1.bias", "w2": "fc2.weight", "b2": "fc2.bias"}
_PREFIX = "model."
_OUTPUT_LAYER = "lm_head.weight"
# One embedding, under the names of its four places in a whole model; a file holds only the first.
_TIED = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight", _OUTPUT_LAYER)
# Rebuilt from the configuration, and found in checkpoints of old releases only.
_POSITION_TABLE = "embed_positions.weights"


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, or does not fit the model."""


def hf_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every weight of `model` under its Hugging Face name, as a view: expert e of a stack is one slice.

    Names are those of `NllbMoeModel` (or `NllbMoeEncoder` for an encoder), without the outer prefix.
    """
    tensors = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        stem, _, leaf = name.rpartition(".")
        if stem.endswith("ffn.experts"):
            for expert, view in enumerate(parameter.detach().unbind(0)):
                tensors[f"{stem}.expert_{expert}.{_EXPERT_TENSORS[leaf]}"] = view
        else:
            tensors[name] = parameter.detach()
    return tensors


def hf_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """`hf_tensors` with the names of the published checkpoint: `NllbMoeForConditionalGeneration`'s for a translator."""
    tensors = hf_tensors(model)
    if "shared.weight" not in tensors:
        return tensors
    named = {_PREFIX + name: tensor for name, tensor in tensors.items()}
    return {**named, _OUTPUT_LAYER: tensors["shared.weight"]}


def load_hf_state_dict(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Copy a Hugging Face state dict into `model`, in the model's dtype.

    Accepted: `NllbMoeForConditionalGeneration`, `NllbMoeModel`, and for an encoder also `NllbMoeEncoder` alone. Tied
    embeddings may be stored once or several times.

    Raises:
        CheckpointError: a missing, unexpected or misshapen tensor, or tied embeddings that differ. Nothing has been
            changed then.
    """
    slots = hf_tensors(model)
    given = _canonical_names(state_dict, whole_model="shared.weight" in slots)
    missing = sorted(slots.keys() - given.keys())
    unexpected = sorted(given.keys() - slots.keys())
    misshapen = sorted(
        f"{name} {list(given[name].shape)}, expected {list(slots[name].shape)}"
        for name in slots.keys() & given.keys()
        if given[name].shape != slots[name].shape
    )
    complaints = [
        f"{what}: {', '.join(names[:5])}{f' and {len(names) - 5} more' if len(names) > 5 else ''}"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("wrong shape", misshapen))
        if names
    ]
    if complaints:
        raise CheckpointError("the state dict does not fit this configuration; " + "; ".join(complaints))
    with torch.no_grad():
        for name, slot in slots.items():
            slot.copy_(given[name])


def _canonical_names(state_dict: Mapping[str, Tensor], whole_model: bool) -> dict[str, Tensor]:
    """Names as `hf_tensors` has them, with the tied embedding under each of its names."""
    given = {
        name.removeprefix(_PREFIX): tensor
        for name, tensor in state_dict.items()
        if not name.endswith(_POSITION_TABLE)
    }
    tied = [name for name in _TIED if name in given]
    for name in tied[1:]:
        if given[name].data_ptr() != given[tied[0]].data_ptr() and not torch.equal(
            given[name], given[tied[0]]
        ):
            raise CheckpointError(f"{tied[0]} and {name} differ, but this model ties them")
    if tied:
        given.update(dict.fromkeys(_TIED[:3], given[tied[0]]))
        given.pop(_OUTPUT_LAYER, None)
    if whole_model:
        return given
    inside = {
        name.removeprefix("encoder."): tensor for name, tensor in given.items() if name.startswith("encoder.")
    }
    return inside or given


def save_checkpoint(
    model: nn.Module, config: MoEConfig, directory: str | Path, dtype: torch.dtype | None = None
) -> None:
    """Write `config.json` and `model.safetensors` (Hugging Face names, the tied embedding once).

    Args:
        model: a translator, or an encoder alone.
        config: the one that `model` was built from.
        directory: made where it does not exist.
        dtype: store floating tensors as this dtype; None keeps the model's.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    named = hf_state_dict(model)
    whole_model = _OUTPUT_LAYER in named
    tensors = {
        name: tensor.to("cpu", dtype).contiguous()
        for name, tensor in named.items()
        if not whole_model or name.removeprefix(_PREFIX) not in _TIED[1:]
    }
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    architecture = "NllbMoeForConditionalGeneration" if whole_model else "NllbMoeEncoder"
    values = {"model_type": "nllb-moe", "architectures": [architecture], **asdict(config)}
    (directory / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def read_checkpoint(directory: str | Path) -> tuple[MoEConfig, dict[str, Tensor]]:
    """Read what `save_checkpoint` wrote. safetensors holds numbers only: nothing in the file is executed.

    Raises:
        CheckpointError: no such directory or file, or a damaged one.
    """
    directory = Path(directory)
    path = directory / "model.safetensors"
    if not path.is_file():
        raise CheckpointError(
            f"no checkpoint at {path}: train one with `moe-edu train --out {directory}`, "
            "or leave the path out for the model that ships with the package"
        )
    try:
        config = MoEConfig.from_hf(directory)
        with safe_open(path, framework="pt") as file:
            return config, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError, TypeError, OSError) as error:
        raise CheckpointError(f"the checkpoint in {directory} cannot be read: {error}") from error
