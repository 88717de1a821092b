"""Greedy and beam search against slow forms; equality with `transformers` is in test_parity.py."""

import itertools

import pytest
import torch

from moe_edu.model import MoETranslator

START, PAD, EOS = 2, 1, 2


def make_model(config, seed: int = 0) -> MoETranslator:
    """Large weights and small embeddings: otherwise one token repeats, whatever the source."""
    torch.manual_seed(seed)
    model = MoETranslator(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3 if name == "shared.weight" else 1.0)
    return model


def log_probs(model: MoETranslator, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """`[L, V]` for one sentence, without a cache."""
    with torch.no_grad():
        return model(source, decoder_input_ids=target).logits[0].log_softmax(-1)


def slow_greedy(model, source, forced, max_new_tokens) -> list[int]:
    tokens = [START]
    for i in range(max_new_tokens):
        token = int(log_probs(model, source, torch.tensor([tokens]))[-1].argmax())
        tokens.append(forced if i == 0 and forced is not None else token)
        if tokens[-1] == EOS:
            break
    return tokens


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("forced", [None, 7])
def test_greedy_is_the_argmax_of_each_step_and_batching_changes_nothing(tiny_config, seed, forced):
    model = make_model(tiny_config(vocab_size=9), seed)
    source = torch.randint(3, 9, (4, 5))
    source[1, 3:] = source[2, 1:] = PAD
    generated = model.generate(source, source != PAD, forced_bos_token_id=forced, max_new_tokens=8)
    expected = [slow_greedy(model, row[row != PAD][None], forced, 8) for row in source]
    length = max(map(len, expected))
    assert generated.tolist() == [row + [PAD] * (length - len(row)) for row in expected]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("forced", [None, 4])
def test_a_beam_wide_enough_finds_the_best_of_all_translations(tiny_config, seed, forced):
    """Every translation of at most three tokens is scored one by one."""
    V, longest = 5, 3
    model = make_model(tiny_config(vocab_size=V), seed)
    source = torch.randint(3, V, (1, 4))
    best, best_score = None, -torch.inf
    for length in range(1, longest + 1):
        for tokens in itertools.product(range(V), repeat=length):
            ends_early = EOS in tokens[:-1]
            unfinished = tokens[-1] != EOS and length < longest
            if ends_early or unfinished or (forced is not None and tokens[0] != forced):
                continue
            scores = log_probs(model, source, torch.tensor([[START, *tokens[:-1]]]))
            steps = [scores[i, token].item() for i, token in enumerate(tokens)]
            score = sum(steps if forced is None else steps[1:])
            if score > best_score:
                best, best_score = [START, *tokens], score
    found = model.generate(
        source,
        num_beams=V**longest,
        max_new_tokens=longest,
        length_penalty=0.0,
        forced_bos_token_id=forced,
    )
    assert found.tolist() == [best]


@pytest.mark.parametrize("num_beams", [1, 3])
def test_is_pure_and_repeats(tiny_config, num_beams):
    model = make_model(tiny_config())
    source = torch.randint(3, 29, (2, 5))
    before, state = source.clone(), torch.get_rng_state()
    once = model.generate(source, num_beams=num_beams, max_new_tokens=6)
    assert torch.equal(once, model.generate(source, num_beams=num_beams, max_new_tokens=6))
    assert torch.equal(source, before)
    assert torch.equal(state, torch.get_rng_state())
    assert not once.requires_grad


@pytest.mark.parametrize("num_beams", [1, 3])
def test_never_longer_than_asked_or_than_the_positions(tiny_config, num_beams):
    model = make_model(tiny_config(max_position_embeddings=6))
    with torch.no_grad():  # </s> never comes
        model.shared.weight[EOS] = 0
    source = torch.randint(3, 29, (2, 5))
    assert model.generate(source, num_beams=num_beams, max_new_tokens=3).shape[1] <= 4
    assert model.generate(source, num_beams=num_beams, max_new_tokens=100).shape[1] <= 7


def test_training_mode_is_refused(tiny_config):
    with pytest.raises(ValueError, match=r"model\.eval\(\)"):
        make_model(tiny_config()).train().generate(torch.full((1, 2), 5))


@pytest.mark.parametrize("options", [{"num_beams": 0}, {"max_new_tokens": 0}])
def test_options_out_of_range_are_refused(tiny_config, options):
    with pytest.raises(ValueError, match="at least 1"):
        make_model(tiny_config()).generate(torch.full((1, 2), 5), **options)
