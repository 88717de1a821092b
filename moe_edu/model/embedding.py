"""Token embeddings, positions, and the weights that a new model begins with.

Shapes: B batch, S sequence, D model width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_edu.config import MoEConfig


class PositionTable(nn.Module):
    """Sinusoidal positions counted from `padding_idx + 1` over real tokens; padding gets zeros.

    Source: tensor2tensor's form of Vaswani et al. 2017, section 3.5: all sines, then all cosines.
    """

    table: Tensor

    def __init__(self, num_positions: int, d_model: int, padding_idx: int) -> None:
        super().__init__()
        self.num_positions = num_positions
        self.padding_idx = padding_idx
        half = d_model // 2
        rates = torch.exp(torch.arange(half) * (-math.log(10000) / max(half - 1, 1)))
        angles = torch.arange(num_positions + padding_idx + 1)[:, None] * rates
        table = F.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, d_model % 2))
        table[padding_idx] = 0
        self.register_buffer("table", table.to(torch.get_default_dtype()), persistent=False)

    def forward(self, words: Tensor, start: int = 0) -> Tensor:
        """`words [B, S]` bool, True for real tokens; `start` tokens came before: `[B, S, D]`.

        Raises:
            ValueError: more tokens than the model has positions.
        """
        length = start + words.shape[1]
        if length > self.num_positions:
            raise ValueError(
                f"{length} tokens are more than the model's {self.num_positions} positions: "
                "shorten the text or raise config.max_position_embeddings"
            )
        index = (words.long().cumsum(dim=1) + start) * words + self.padding_idx
        return self.table[index]


def make_embedding(config: MoEConfig) -> nn.Embedding:
    return nn.Embedding(config.vocab_size, config.d_model, padding_idx=config.pad_token_id)


def embed(
    embedding: nn.Embedding, input_ids: Tensor | None, inputs_embeds: Tensor | None, config: MoEConfig
) -> tuple[Tensor, Tensor]:
    """Embeddings `[B, S, D]`, and `[B, S]` bool that is True where a position counts."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("give either input_ids or inputs_embeds, not both and not neither")
    if inputs_embeds is not None:
        return inputs_embeds, inputs_embeds.new_ones(inputs_embeds.shape[:2], dtype=torch.bool)
    assert input_ids is not None
    if input_ids.ndim != 2:
        raise ValueError(f"input_ids must be [B, S]; got {list(input_ids.shape)}")
    scale = math.sqrt(config.d_model) if config.scale_embedding else 1.0
    return embedding(input_ids) * scale, input_ids != config.pad_token_id


def initialize(model: nn.Module, config: MoEConfig) -> None:
    """Normal weights of standard deviation `init_std`, zero biases and padding row, as `transformers` does."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=config.init_std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=config.init_std)
            with torch.no_grad():
                module.weight[config.pad_token_id] = 0
