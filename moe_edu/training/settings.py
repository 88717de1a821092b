"""The settings of a training run, `TrainingSettings`, and the model that trains in minutes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from moe_edu.config import MoEConfig

Precision = Literal["auto", "fp32", "bf16", "fp16"]


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """How to train. The model itself, including the coefficients of the router losses, is set by `MoEConfig`.

    Attributes:
        steps: optimizer steps. Ignored when `seconds` is set.
        seconds: train for this long instead; the schedule then follows the clock.
        seed: seed of weights, data order and dropout.
        languages: FLORES-200 codes to train on; None for all languages of the corpus.
        sources: languages to translate from; None for all of `languages`.
        targets: languages to translate into; None for all of `languages`.
        batch_tokens: upper limit of sentence pairs times the tokens of the longest sentence; a batch has about twice
            as many tokens, source and target together.
        shards: parts that each batch is cut into, which are routed and differentiated separately; on the CPU each has
            its own process if there are that many cores; by default two on the CPU and one on a GPU.
        und_rate: share of source tags replaced by "und", so that the model also learns to do without them.
        vocab_size: size of the tokenizer's vocabulary, tags included.
        learning_rate: peak of the schedule, which is a linear warm-up, then a cosine to zero.
        warmup_steps: steps of linear warm-up.
        weight_decay: weight decay of AdamW.
        clip_norm: gradients with a larger norm are scaled down to this one.
        label_smoothing: label smoothing of the cross-entropy.
        z_loss: weight of the cross-entropy's z term.
        device: "auto" takes a GPU where there is one.
        precision: "auto" is fp32 on the CPU; on a GPU it is bf16, or fp16 if the GPU has no bf16.
        log_every: steps between log lines.
        eval_every: steps between evaluations on the validation split.
        eval_sentences: validation sentences to translate at each evaluation.
    """

    steps: int = 4000
    seconds: float | None = None
    seed: int = 0
    languages: tuple[str, ...] | None = None
    sources: tuple[str, ...] | None = None
    targets: tuple[str, ...] | None = ("eng_Latn",)
    batch_tokens: int = 400
    shards: int | None = None
    und_rate: float = 0.2
    vocab_size: int = 3000
    learning_rate: float = 3e-3
    warmup_steps: int = 600
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    device: str = "auto"
    precision: Precision = "auto"
    log_every: int = 20
    eval_every: int = 400
    eval_sentences: int = 200

    def __post_init__(self) -> None:
        positive = ("steps", "batch_tokens", "learning_rate", "clip_norm", "log_every", "eval_every")
        for name in positive:
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(
                    f"TrainingSettings.{name} must be positive and finite; got {getattr(self, name)}"
                )
        for name in ("seed", "warmup_steps", "eval_sentences", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(
                    f"TrainingSettings.{name} must be finite and at least 0; got {getattr(self, name)}"
                )
        if self.seed >= 2**64:
            raise ValueError(f"TrainingSettings.seed must be below 2**64; got {self.seed}")
        if not 0 <= self.und_rate <= 1:
            raise ValueError(f"TrainingSettings.und_rate must lie in [0, 1]; got {self.und_rate}")
        for name in ("languages", "sources", "targets"):
            if getattr(self, name) == ():
                raise ValueError(
                    f"TrainingSettings.{name} names no language: name at least one, or leave it out for all"
                )
        for name in ("seconds", "shards"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"TrainingSettings.{name} must be positive and finite; got {value}")


def small_config(**fields: Any) -> MoEConfig:
    """The translator that trains in minutes on two CPU cores; `fields` override its defaults."""
    defaults: dict[str, Any] = {
        "vocab_size": 3000,
        "max_position_embeddings": 160,
        "d_model": 128,
        "encoder_layers": 2,
        "encoder_ffn_dim": 256,
        "encoder_attention_heads": 4,
        "encoder_sparse_step": 2,
        "encoder_layerdrop": 0.0,
        "decoder_layers": 1,
        "decoder_ffn_dim": 256,
        "decoder_attention_heads": 4,
        "decoder_sparse_step": 0,
        "decoder_layerdrop": 0.0,
        "num_experts": 8,
        "expert_capacity_factor": 1.25,
        "moe_token_dropout": 0.0,
        "router_aux_loss_coef": 0.01,
        "router_z_loss_coef": 0.0,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "init_std": 0.05,
    }
    return MoEConfig(**{**defaults, **fields})
