"""moe_edu: the sparse Mixture-of-Experts encoder of NLLB-MoE, to read, run and train.

Shape letters, used all over the package: B batch, S sequence, T = B * S tokens, D model width, F feed-forward width,
E experts, K choices per token (2), C capacity of one expert, V vocabulary.
"""

from moe_edu.config import MoEConfig
from moe_edu.model.checkpoint import CheckpointError
from moe_edu.model.encoder import EncoderOutput, MoEEncoder
from moe_edu.model.pretrained import TextTranslator, load_pretrained
from moe_edu.model.translator import MoETranslator
from moe_edu.moe.experts import BackendChoice, explain_backend
from moe_edu.moe.layer import SparseMLP
from moe_edu.moe.losses import (
    MoELoss,
    SpecialLossNormalizingFactor,
    moe_loss,
    summarize_metrics,
    weighted_cross_entropy,
)
from moe_edu.moe.metrics import ExpertMetrics, collect_metrics
from moe_edu.moe.router_losses import load_balancing_loss, router_z_loss
from moe_edu.moe.routing import RouterOutput, Top2Router, expert_capacity, top2_gating

__version__ = "0.1.0"

__all__ = [
    "BackendChoice",
    "CheckpointError",
    "EncoderOutput",
    "ExpertMetrics",
    "MoEConfig",
    "MoEEncoder",
    "MoELoss",
    "MoETranslator",
    "RouterOutput",
    "SparseMLP",
    "SpecialLossNormalizingFactor",
    "TextTranslator",
    "Top2Router",
    "collect_metrics",
    "expert_capacity",
    "explain_backend",
    "load_balancing_loss",
    "load_pretrained",
    "moe_loss",
    "router_z_loss",
    "summarize_metrics",
    "top2_gating",
    "weighted_cross_entropy",
]
