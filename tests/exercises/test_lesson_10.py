"""Each starter of lesson 10 has the published code's bug, and each fixed version agrees with the package.

The starters are compared with transformers 4.57.6 on random inputs. Other releases cannot be installed in the same
environment; their starters were compared by hand with the files that `origin` names.
"""

import importlib.metadata

import pytest
import torch
from torch.nn import functional as F
from transformers import (
    MixtralConfig,
    NllbMoeConfig,
    NllbMoeForConditionalGeneration,
    SwitchTransformersConfig,
)
from transformers.modeling_outputs import Seq2SeqMoEModelOutput
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func as mixtral_balancing_loss
from transformers.models.nllb_moe.modeling_nllb_moe import (
    NllbMoeEncoderLayer,
    NllbMoeSparseMLP,
    NllbMoeTop2Router,
    load_balancing_loss_func,
)
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersSparseMLP

from moe_edu.exercises.lesson_10 import EXERCISES
from moe_edu.exercises.lesson_10_losses import _OUTPUTS
from moe_edu.moe.router_losses import load_balancing_loss, router_z_loss
from moe_edu.moe.routing import expert_capacity, top2_gating

BY_KEY = {exercise.key: exercise for exercise in EXERCISES}
SEEDS = range(8)


def cases(key):
    """The starter, the solution and inputs."""
    exercise = BY_KEY[key]
    for seed in SEEDS:
        yield (
            exercise.starter,
            exercise.solution,
            exercise.draw(torch.Generator().manual_seed(seed)),
        )


def router(num_experts, **fields):
    config = {"d_model": 8, "num_experts": num_experts, "expert_capacity": None}
    return NllbMoeTop2Router(NllbMoeConfig(**{**config, **fields}))


def test_at_least_ten_come_from_published_releases():
    assert len([exercise for exercise in EXERCISES if exercise.starter and exercise.origin]) >= 10
    assert importlib.metadata.version("transformers") == "4.57.6"


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda exercise: exercise.key)
def test_each_names_the_test_that_catches_it(exercise):
    assert "test" in exercise.task


def test_10_1_words_taken():
    """The layer's second result is the argmax of its router's mask; the loss counts with it."""
    for starter, solution, (mask,) in cases("10.1"):
        E = mask.shape[1]
        layer = NllbMoeSparseMLP(NllbMoeConfig(d_model=8, num_experts=E), ffn_dim=4)
        layer.router.forward = lambda hidden, padding, mask=mask: (mask, mask.float())
        _, (_, expert_index) = layer(torch.ones(1, len(mask), 8), None)
        assert torch.equal(starter(mask), expert_index.bincount(minlength=E))
        assert solution(mask).sum() == mask.sum()


def test_10_2_choices_of_words():
    for starter, solution, (mask, attention_mask) in cases("10.2"):
        logits = 9.0 * mask
        taken, _ = router(mask.shape[1]).eval().route_tokens(logits, padding_mask=attention_mask)
        assert torch.equal(starter(mask, attention_mask), taken)
        ours = top2_gating(logits, capacity=len(mask), padding=attention_mask == 0)
        assert torch.equal(solution(mask, attention_mask).any(dim=1), ours.kept[:, 0])


def test_10_3_capacities(tiny_config):
    for starter, solution, (tokens, training, E) in cases("10.3"):
        published = router(E)
        seen = []
        for T, trains in zip(tokens, training, strict=True):
            published.train(trains).route_tokens(torch.randn(T, E))
            seen.append(published.expert_capacity)
        assert starter(tokens, training, E) == seen
        config = tiny_config(num_experts=E, expert_capacity=None)
        ours = [expert_capacity(T, config, trains) for T, trains in zip(tokens, training, strict=True)]
        assert solution(tokens, training, E) == ours


def test_10_4_sampled_second(monkeypatch):
    """4.57.6 changes the logits in place too; 5.23.0 also returns them."""
    for starter, solution, (logits, noise) in cases("10.4"):
        gumbel = torch.distributions.gumbel.Gumbel
        monkeypatch.setattr(gumbel, "rsample", lambda self, shape, noise=noise: noise)
        given = logits.clone()
        router(logits.shape[1], second_expert_policy="sampling").route_tokens(given)
        second, returned = starter(logits.clone(), noise)
        assert torch.equal(returned, given)
        clean_second, clean = solution(logits, noise)
        assert torch.equal(clean_second, second)
        assert torch.equal(clean, logits)


def test_10_5_gates():
    """The published router would drop by capacity, so only its normalisation is called, on the drawn choices."""
    published = router(4)
    for starter, solution, (logits, chosen, kept) in cases("10.5"):
        E = logits.shape[1]
        masks = F.one_hot(chosen, E) * kept[..., None]
        expected = published.normalize_router_probabilities(logits.softmax(1), masks[:, 0], masks[:, 1])
        torch.testing.assert_close(starter(logits, chosen, kept), torch.stack(expected, dim=1))
        sums = solution(logits, chosen, kept).sum(dim=1)
        torch.testing.assert_close(sums, kept.any(dim=1).float())


def test_10_5_gates_agree_with_ours():
    for _, solution, (logits, _, _) in cases("10.5"):
        ours = top2_gating(logits, capacity=2)
        torch.testing.assert_close(solution(logits, ours.expert_index, ours.kept), ours.combine_weights)


def test_10_6_random_gates(monkeypatch):
    for starter, solution, (probs, chosen, uniform) in cases("10.6"):
        monkeypatch.setattr(torch, "rand_like", lambda tensor, uniform=uniform: uniform)
        fields = {"second_expert_policy": "random", "normalize_router_prob_before_dropping": True}
        _, weights = router(probs.shape[1], **fields).eval().route_tokens(probs.log())
        torch.testing.assert_close(starter(probs, chosen, uniform), weights.gather(1, chosen))
        gates = solution(probs, chosen, uniform)
        both = gates[:, 1] > 0
        torch.testing.assert_close(gates[both].sum(dim=1), torch.ones(int(both.sum())))


def test_10_7_add_branch():
    starter, solution, (hidden, branch, noise, dropout, activation_dropout) = next(cases("10.7"))
    config = NllbMoeConfig(
        d_model=8, encoder_attention_heads=2, dropout=dropout, activation_dropout=activation_dropout
    )
    rate = NllbMoeEncoderLayer(config).ff_dropout.p
    args = (hidden, branch, noise)
    assert torch.equal(starter(*args, dropout, activation_dropout), solution(*args, rate, activation_dropout))


def test_10_8_mask_outputs():
    """Like `nn.Dropout`, elementwise and rescaled in training; but also scaled in eval."""
    R, D, p = 20_000, 4, 0.4
    outputs, noise = torch.ones(R, D), torch.rand(R, D, generator=torch.Generator().manual_seed(0))
    starter, solution = BY_KEY["10.8"].starter, BY_KEY["10.8"].solution
    layer = NllbMoeSparseMLP(NllbMoeConfig(d_model=D, num_experts=2, moe_token_dropout=p), ffn_dim=4)
    assert torch.equal(starter(outputs, noise, p, True).unique(), layer.token_dropout(outputs).unique())
    assert starter(outputs, noise, p, True).mean() > 1.5 * starter(outputs, noise, p, False).mean()
    torch.testing.assert_close(
        solution(outputs, noise, p, True).mean(), solution(outputs, noise, p, False).mean(), rtol=0.02, atol=0
    )


def test_10_9_switch_layer(monkeypatch):
    for starter, solution, (hidden, jitter, weight, experts) in cases("10.9"):
        (T, D), E = hidden.shape, len(experts)
        config = SwitchTransformersConfig(
            d_model=D, d_ff=4, num_experts=E, expert_capacity=T, router_jitter_noise=0.5, router_bias=False
        )
        layer = SwitchTransformersSparseMLP(config).train()
        layer.router.classifier.weight.data = weight.clone()
        for e in range(E):
            layer.experts[f"expert_{e}"] = torch.nn.Linear(D, D, bias=False)
            layer.experts[f"expert_{e}"].weight.data = experts[e].T.contiguous()
        with torch.no_grad(), monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "uniform_", lambda self, low, high, jitter=jitter: self.copy_(jitter))
            published, _ = layer(hidden.clone()[None])
        torch.testing.assert_close(starter(hidden.clone(), jitter, weight, experts), published[0])
        one = experts[:1]
        torch.testing.assert_close(
            solution(hidden, jitter, weight[:1], one),
            solution(hidden, torch.ones_like(jitter), weight[:1], one),
        )


def test_10_10_find_room():
    for starter, solution, (probs, capacity) in cases("10.10"):
        E = probs.shape[1]
        assert starter(probs, capacity).all(), "the published capacity drops no word"
        ours = top2_gating(probs.log(), capacity=capacity)
        assert torch.equal(solution(probs, capacity), ours.kept[:, 0])
        kept = probs.argmax(dim=1)[solution(probs, capacity)]
        assert kept.bincount(minlength=E).max() <= capacity


def test_10_11_experts_to_run():
    differ = False
    for starter, solution, (mask,) in cases("10.11"):
        chosen = torch.unique(mask.argmax(dim=-1)).tolist()
        assert solution(mask).nonzero().flatten().tolist() == chosen
        differ |= not torch.equal(starter(mask), solution(mask))
    assert differ


def test_10_12_sparse_layer():
    """The bug sends every first choice to expert 1 and every second choice to expert 0, with the right gates."""
    for starter, solution, (hidden, experts, top_1_mask, gates) in cases("10.12"):
        dense = torch.einsum("te,td,edf->tf", gates, hidden, experts)
        torch.testing.assert_close(solution(hidden, experts, top_1_mask, gates), dense)
        first = (gates * top_1_mask).sum(dim=1, keepdim=True)
        second = gates.sum(dim=1, keepdim=True) - first
        swapped = first * (hidden @ experts[1]) + second * (hidden @ experts[0])
        torch.testing.assert_close(starter(hidden, experts, top_1_mask, gates), swapped)


def test_10_13_total_loss():
    """tests/moe/test_loss_defects.py shows that the published loss ignores the coefficient."""
    for starter, solution, (cross_entropy, balance, logits, aux, z) in cases("10.13"):
        without = starter(cross_entropy, balance, logits, aux, z)
        ours = without + z * router_z_loss(logits)
        torch.testing.assert_close(solution(cross_entropy, balance, logits, aux, z), ours)


class TestDecoderRouting:
    def model(self):
        config = NllbMoeConfig(
            vocab_size=29, d_model=8, num_experts=4, encoder_layers=1, decoder_layers=1, encoder_sparse_step=1,
            decoder_sparse_step=1, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=8,
            decoder_ffn_dim=8, output_router_logits=True,
        )  # fmt: skip
        return NllbMoeForConditionalGeneration(config).eval()

    def test_names_are_in_the_published_order(self):
        assert list(_OUTPUTS) == list(Seq2SeqMoEModelOutput.__dataclass_fields__)

    def test_published_loss_of_the_decoder_is_the_encoders(self):
        model, ids = self.model(), torch.tensor([[5, 6, 7, 2]])
        loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids)
        assert loss.decoder_aux_loss == loss.encoder_aux_loss
        weight = model.model.decoder.layers[0].ffn.router.classifier.weight
        assert torch.autograd.grad(loss.decoder_aux_loss, weight, allow_unused=True) == (None,)

    def test_published_code_fails_without_a_cache(self):
        model, ids = self.model(), torch.tensor([[5, 6, 7, 2]])
        with pytest.raises(IndexError, match="tuple index out of range"):
            model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, use_cache=False)


def test_10_15_balancing_loss():
    for starter, solution, (probs, first) in cases("10.15"):
        layers = list(zip(probs, first, strict=True))
        unpacked = NllbMoeForConditionalGeneration._unpack_router_logits(None, layers)
        torch.testing.assert_close(starter(probs, first), load_balancing_loss_func(*unpacked))
        ours = torch.stack([load_balancing_loss(p, e[:, None]) for p, e in layers]).mean()
        torch.testing.assert_close(solution(probs, first), ours)


def test_10_16_balancing_loss_of_logits():
    for starter, solution, (logits,) in cases("10.16"):
        E = logits[0].shape[1]
        torch.testing.assert_close(starter(logits), mixtral_balancing_loss(tuple(logits), E, top_k=2))
        ours = [load_balancing_loss(x.softmax(1), x.topk(2, dim=1).indices, choices="all") for x in logits]
        torch.testing.assert_close(solution(logits), torch.stack(ours).mean())


def test_10_16_two_collapses_look_even():
    low, high = (
        torch.tensor([9.0, 9.0, 0.0, 0.0]).expand(6, 4),
        torch.tensor([0.0, 0.0, 9.0, 9.0]).expand(6, 4),
    )
    even = mixtral_balancing_loss((low, high), 4, top_k=2)
    assert even.item() == pytest.approx(MixtralConfig().num_experts_per_tok)
    assert BY_KEY["10.16"].solution([low, high]).item() == pytest.approx(4, rel=1e-3)
