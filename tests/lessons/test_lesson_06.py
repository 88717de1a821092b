"""What lesson 06 says in words and its own cells do not check."""

import math

import torch

from moe_edu import MoEConfig
from moe_edu.model.layers import clamp_overflow


def test_a_position_is_35_times_as_long_as_a_fresh_embedding():
    config = MoEConfig()
    embedding = config.init_std * math.sqrt(config.d_model)
    assert round(math.sqrt(config.d_model / 2) / embedding) == 35


def test_the_published_model_masks_a_fifth_and_has_experts_in_every_fourth_layer():
    config = MoEConfig()
    assert (config.moe_token_dropout, config.encoder_sparse_step) == (0.2, 4)


def test_where_fp16_ends_and_where_the_clamp_is():
    assert torch.finfo(torch.float16).max == 65504
    assert round(clamp_overflow(torch.tensor([torch.inf]).half()).item(), -2) == 64500
    assert torch.finfo(torch.bfloat16).max > 3e38


def test_rates_go_from_one_to_a_ten_thousandth():
    half = 8 // 2
    rates = [10000 ** (-i / (half - 1)) for i in range(half)]
    assert rates[0] == 1
    assert math.isclose(rates[-1], 1e-4)
