"""moe_edu: the sparse Mixture-of-Experts encoder of NLLB-MoE, to read, run and train.

Shape letters, used all over the package: B batch, S sequence, T = B * S tokens, D model width, F feed-forward width,
E experts, K choices a token (2), C capacity of one expert, V vocabulary.
"""

from moe_edu.backends import BackendChoice, explain_backend
from moe_edu.checkpoint import CheckpointError
from moe_edu.config import MoEConfig
from moe_edu.layers import SparseMLP
from moe_edu.losses import (
    MoELoss,
    SpecialLossNormalizingFactor,
    load_balancing_loss,
    moe_loss,
    router_z_loss,
    weighted_cross_entropy,
)
from moe_edu.metrics import ExpertMetrics, collect_metrics, summarize_metrics
from moe_edu.model import EncoderOutput, MoEEncoder, MoETranslator
from moe_edu.pretrained import TextTranslator, load_pretrained
from moe_edu.routing import RouterOutput, Top2Router, expert_capacity, top2_gating

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
