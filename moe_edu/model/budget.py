"""Where a model's parameters sit, and where its arithmetic goes: counted from the configuration alone.

Shapes: S source tokens, L target tokens, D model width, F feed-forward width, E experts, K choices per token,
V vocabulary. Sources of the published numbers: NLLB Team 2022 (54.5 billion parameters), and Koishekenov et al. 2022,
section 3.2 (the same model part by part, arXiv 2212.09811).
"""

from __future__ import annotations

from typing import NamedTuple

from moe_edu.config import MoEConfig

_CHOICES = 2


class Parts(NamedTuple):
    """One number for each part of a model.

    Attributes:
        embedding: the vocabulary's vectors, shared by both ends; as FLOPs, the logits that they give at the end.
        attention: self-attention, and the decoder's cross-attention.
        norms: layer norms; as FLOPs not counted.
        feed_forward: the dense feed-forward networks.
        router: one score per expert.
        experts: the sparse layers' feed-forward networks; as FLOPs, with the weighted sum of their outputs.
    """

    embedding: int
    attention: int
    norms: int
    feed_forward: int
    router: int
    experts: int

    @property
    def total(self) -> int:
        return sum(self)


def stored_parameters(config: MoEConfig, *, decoder: bool = True) -> Parts:
    """The parameters to keep in memory: of a `MoETranslator`, or of a `MoEEncoder` where `decoder` is False."""
    return _parameters(config, decoder, config.num_experts)


def active_parameters(config: MoEConfig, *, decoder: bool = True) -> Parts:
    """The parameters that one token uses: all of them, except those of the experts that it does not visit."""
    return _parameters(config, decoder, _visited(config))


def expert_parameters(d_model: int, ffn_dim: int) -> int:
    """Weights and biases of one expert, or of one dense feed-forward network: `2 * D * F + F + D`."""
    return 2 * d_model * ffn_dim + ffn_dim + d_model


def forward_flops(config: MoEConfig, source_length: int, target_length: int = 0) -> Parts:
    """Floating-point operations of one forward pass over one sentence (pair), without a cache.

    A multiplication and its addition count as two, as usual; only matrix products are counted. Nothing is dropped, and
    what the causal mask hides is computed all the same, as in the model.

    Args:
        source_length: S, tokens that the encoder reads.
        target_length: L, tokens that the decoder reads and gives logits for; 0 for the encoder alone.
    """
    D, S, L = config.d_model, source_length, target_length
    encoder_sparse, decoder_sparse = _sparse_layers(config)
    attention = config.encoder_layers * (8 * S * D * D + 4 * S * S * D)
    if L:
        self_attention = 8 * L * D * D + 4 * L * L * D
        cross_attention = 4 * L * D * D + 4 * S * D * D + 4 * L * S * D
        attention += config.decoder_layers * (self_attention + cross_attention)
    encoder_ffn, decoder_ffn = 4 * S * D * config.encoder_ffn_dim, 4 * L * D * config.decoder_ffn_dim
    routed = encoder_sparse * S + decoder_sparse * L
    combine = 2 * _CHOICES * D * routed  # the weighted sum of the experts' outputs
    return Parts(
        embedding=2 * L * D * config.vocab_size,
        attention=attention,
        norms=0,
        feed_forward=(config.encoder_layers - encoder_sparse) * encoder_ffn
        + (config.decoder_layers - decoder_sparse) * decoder_ffn,
        router=2 * D * config.num_experts * routed,
        experts=_visited(config) * (encoder_sparse * encoder_ffn + decoder_sparse * decoder_ffn) + combine,
    )


def _parameters(config: MoEConfig, decoder: bool, experts: int) -> Parts:
    D, E = config.d_model, config.num_experts
    encoder_sparse, decoder_sparse = _sparse_layers(config)
    decoder_layers = config.decoder_layers if decoder else 0
    decoder_sparse = decoder_sparse if decoder else 0
    encoder_ffn = expert_parameters(D, config.encoder_ffn_dim)
    decoder_ffn = expert_parameters(D, config.decoder_ffn_dim)
    # A norm stands before every block (attention, cross-attention, feed-forward) and after each half.
    norms = 2 * config.encoder_layers + 1 + (3 * decoder_layers + 1 if decoder else 0)
    return Parts(
        embedding=config.vocab_size * D,
        attention=(config.encoder_layers + 2 * decoder_layers) * 4 * (D * D + D),
        norms=norms * 2 * D,
        feed_forward=(config.encoder_layers - encoder_sparse) * encoder_ffn
        + (decoder_layers - decoder_sparse) * decoder_ffn,
        router=(encoder_sparse + decoder_sparse) * E * (D + config.router_bias),
        experts=experts * (encoder_sparse * encoder_ffn + decoder_sparse * decoder_ffn),
    )


def _sparse_layers(config: MoEConfig) -> tuple[int, int]:
    """How many layers of the encoder and of the decoder have experts."""
    return (
        _count_sparse(config, config.encoder_layers, config.encoder_sparse_step),
        _count_sparse(config, config.decoder_layers, config.decoder_sparse_step),
    )


def _count_sparse(config: MoEConfig, layers: int, step: int) -> int:
    return sum(config.is_sparse(layer, step) for layer in range(layers))


def _visited(config: MoEConfig) -> int:
    """Experts that a token visits in a sparse layer."""
    return min(_CHOICES, config.num_experts)
