"""`MoEConfig`: every number that shapes the model, under Hugging Face's `NllbMoeConfig` names."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from numbers import Integral, Real
from pathlib import Path
from types import NoneType
from typing import Any, Literal, Self, get_args

SecondExpertPolicy = Literal["all", "sampling", "random"]
ActivationName = Literal["relu", "gelu", "silu"]

_DTYPES = ("float32", "bfloat16", "float16")
_KINDS: dict[str, tuple[type, ...]] = {
    "int": (Integral,),
    "int | None": (Integral, NoneType),
    "float": (Real,),
    "bool": (bool,),
}
# The table of positions is computed, not read from a file: without a limit, an untrusted config.json could ask for
# any amount of memory.
_MOST_POSITIONS = 2**17


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """The shape and behaviour of the encoder and the translator.

    Fields have the names of Hugging Face's `NllbMoeConfig`, so its `config.json` loads unchanged. The defaults are
    that class's, too, except two that follow the training of the released 54B model (NLLB Team 2022, section 6.2 and
    appendix F.2): `expert_capacity` (None: `2 * ceil(T / E)`) and `router_aux_loss_coef` (0.01).

    The defaults of the router and the experts, from `num_experts` to `router_aux_loss_coef`, and the sparse steps are
    those of the released model. The other defaults are not: the released model has `d_model` 2048, 24 layers on each
    side and a `vocab_size` of 256,206, and was trained with `dropout` 0.3 and without LayerDrop. `from_hf` reads its
    numbers from its `config.json`.

    Fields that training reads:
        router_aux_loss_coef: weight of the load balancing loss; has no effect in a dense model.
        router_z_loss_coef: weight of the router z-loss; has no effect in a dense model.

    Fields that Hugging Face does not have:
        expert_capacity_factor: scales the training capacity `2 * ceil(T / E)`; 1.0 is the published setting.
        sample_in_eval: apply `second_expert_policy` in eval, too; otherwise eval always uses "all".
        elementwise_token_dropout: reproduce the expert output masking of `transformers`, which drops single elements
            and rescales the rest (unlike fairseq; only for comparisons).
        activation_dropout_on_residual: reproduce `transformers`, whose feed-forward residual uses
            `activation_dropout` where the dense model uses `dropout`; only for comparisons.
        gradient_checkpointing: recompute each layer in backward instead of keeping its activations.

    Raises:
        ValueError: a field has the wrong type or is out of range; the message names the field and its rule. Only
            attention checks that its heads divide `d_model`, so that a router needs no heads.
    """

    vocab_size: int = 128112
    max_position_embeddings: int = 1024
    d_model: int = 1024
    encoder_layers: int = 12
    encoder_ffn_dim: int = 4096
    encoder_attention_heads: int = 16
    encoder_layerdrop: float = 0.05
    encoder_sparse_step: int = 4
    decoder_layers: int = 12
    decoder_ffn_dim: int = 4096
    decoder_attention_heads: int = 16
    decoder_layerdrop: float = 0.05
    decoder_sparse_step: int = 4
    activation_function: ActivationName = "relu"
    dropout: float = 0.1
    attention_dropout: float = 0.1
    activation_dropout: float = 0.0
    init_std: float = 0.02
    scale_embedding: bool = True

    num_experts: int = 128
    expert_capacity: int | None = None
    expert_capacity_factor: float = 1.0
    moe_eval_capacity_token_fraction: float = 1.0
    moe_token_dropout: float = 0.2
    router_bias: bool = False
    router_dtype: str = "float32"
    router_ignore_padding_tokens: bool = False
    second_expert_policy: SecondExpertPolicy = "all"
    sample_in_eval: bool = False
    normalize_router_prob_before_dropping: bool = False
    batch_prioritized_routing: bool = False
    router_aux_loss_coef: float = 0.01
    router_z_loss_coef: float = 0.001

    pad_token_id: int = 1
    bos_token_id: int = 0
    eos_token_id: int = 2
    decoder_start_token_id: int = 2

    elementwise_token_dropout: bool = False
    activation_dropout_on_residual: bool = False
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            kind, value = str(field.type), getattr(self, field.name)
            if kind in _KINDS:
                # In Python, bool is a subclass of int.
                fits = isinstance(value, _KINDS[kind]) and (kind == "bool" or not isinstance(value, bool))
                self._require(fits, field.name, f"be of type {kind}")
            if isinstance(value, float):
                self._require(math.isfinite(value), field.name, "be finite")
        self._require(
            self.max_position_embeddings <= _MOST_POSITIONS,
            "max_position_embeddings",
            f"be at most {_MOST_POSITIONS:,}",
        )
        sizes = ("vocab_size", "max_position_embeddings", "d_model", "num_experts")
        widths = ("encoder_ffn_dim", "decoder_ffn_dim")
        heads = ("encoder_attention_heads", "decoder_attention_heads")
        for name in (*sizes, *widths, *heads):
            self._require(getattr(self, name) >= 1, name, "be at least 1")
        for name in ("encoder_layers", "decoder_layers"):
            self._require(getattr(self, name) >= 0, name, "be at least 0")
        for name in ("dropout", "attention_dropout", "activation_dropout", "moe_token_dropout"):
            self._require(0 <= getattr(self, name) < 1, name, "lie in [0, 1)")
        for name in ("encoder_layerdrop", "decoder_layerdrop"):
            self._require(0 <= getattr(self, name) <= 1, name, "lie in [0, 1]")
        self._require(
            self.expert_capacity is None or self.expert_capacity >= 1,
            "expert_capacity",
            "be None or at least 1",
        )
        self._require(self.expert_capacity_factor > 0, "expert_capacity_factor", "be positive")
        self._require(
            self.second_expert_policy in get_args(SecondExpertPolicy),
            "second_expert_policy",
            f"be one of {', '.join(get_args(SecondExpertPolicy))}",
        )
        self._require(
            self.activation_function in get_args(ActivationName),
            "activation_function",
            f"be one of {', '.join(get_args(ActivationName))}",
        )
        self._require(self.router_dtype in _DTYPES, "router_dtype", f"be one of {', '.join(_DTYPES)}")
        for name in ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"):
            self._require(
                0 <= getattr(self, name) < self.vocab_size, name, f"be an id below {self.vocab_size}"
            )

    def _require(self, holds: bool, name: str, rule: str) -> None:
        if not holds:
            raise ValueError(f"MoEConfig.{name} must {rule}; got {getattr(self, name)!r}")

    @classmethod
    def from_hf(cls, source: Mapping[str, Any] | str | Path) -> Self:
        """Read a Hugging Face `NllbMoeConfig`.

        Args:
            source: its dictionary (`config.to_dict()`), its `config.json`, or the directory that holds one.

        Fields that `MoEConfig` does not have (`transformers_version`, `torch_dtype`, ...) are ignored.

        Raises:
            FileNotFoundError: there is no `config.json`.
            ValueError: the file holds no JSON object, another architecture, or a value out of range.
        """
        values = source if isinstance(source, Mapping) else _read_config_file(Path(source))
        model_type = values.get("model_type", "nllb-moe")
        if model_type != "nllb-moe":
            raise ValueError(
                f"expected model_type 'nllb-moe', got {model_type!r}: this is another architecture"
            )
        known = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known})

    def is_sparse(self, layer: int, sparse_step: int) -> bool:
        """Whether the 0-based `layer` has experts: every `sparse_step`-th one does; none if the step is 0 or less."""
        return sparse_step > 0 and (layer + 1) % sparse_step == 0


def _read_config_file(path: Path) -> Mapping[str, Any]:
    if path.is_dir():
        path = path / "config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"no configuration at {path}: pass a config.json or the directory that holds it"
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))  # with or without a byte order mark
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object, not a {type(values).__name__}")
    return values
