"""Greedy and beam search, compared with slow, obvious forms; test_parity.py compares them with `transformers`."""

import itertools

import pytest
import torch

from moe_edu.model.translator import MoETranslator

pytestmark = pytest.mark.usefixtures("either_code")

START, PAD, EOS = 2, 1, 2


def make_model(config, seed: int = 0, end: float = 0.15) -> MoETranslator:
    """A model with large weights and small embeddings; otherwise one token would repeat, whatever the source.

    Element 0 of the last hidden state is always about 10, which makes padding impossible and adds `10 * end` to the
    score of `</s>`.
    """
    torch.manual_seed(seed)
    model = MoETranslator(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3 if name == "shared.weight" else 1.0)
        model.decoder.layer_norm.bias[0] = 10.0
        model.shared.weight[:, 0] = 0.0
        model.shared.weight[PAD, 0] = -10.0
        model.shared.weight[EOS, 0] = end
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


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("forced", [None, 4])
@pytest.mark.parametrize("end", [-1.0, -0.2, 0.0])
def test_a_beam_wide_enough_finds_the_best_of_all_translations(tiny_config, seed, forced, end):
    """Every translation of at most four tokens is scored, in one batch and without a cache."""
    V, longest = 5, 4
    model = make_model(tiny_config(vocab_size=V), seed, end)
    source = torch.randint(3, V, (1, 4))
    everything = torch.tensor(list(itertools.product(range(V), repeat=longest)))
    shifted = torch.cat([torch.full((len(everything), 1), START), everything[:, :-1]], 1)
    with torch.no_grad():
        logits = model(source.expand(len(everything), -1), decoder_input_ids=shifted).logits
    steps = logits.log_softmax(-1).gather(2, everything[:, :, None])[:, :, 0]
    if forced is not None:
        steps[:, 0] = torch.where(everything[:, 0] == forced, 0.0, -torch.inf)
    # A translation ends with its first </s>; what comes after it is ignored.
    words = ((everything == EOS).cumsum(1) - (everything == EOS).long()) == 0
    best = (steps * words).sum(1).argmax()

    found = model.generate(
        source,
        num_beams=V**longest,
        max_new_tokens=longest,
        length_penalty=0.0,
        forced_bos_token_id=forced,
    )
    assert found.tolist() == [[START, *everything[best][words[best]].tolist()]]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("early_stopping", [False, True])
def test_beams_of_a_batch_are_those_of_each_sentence_alone(tiny_config, seed, early_stopping):
    model = make_model(tiny_config(vocab_size=9), seed)
    source = torch.randint(3, 9, (4, 5))
    source[1, 3:] = source[2, 1:] = PAD
    options = {"num_beams": 3, "max_new_tokens": 8, "early_stopping": early_stopping}
    generated = model.generate(source, source != PAD, **options)
    expected = [model.generate(row[row != PAD][None], **options)[0].tolist() for row in source]
    length = max(map(len, expected))
    assert generated.tolist() == [row + [PAD] * (length - len(row)) for row in expected]


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_a_finished_sentence_leaves_unless_it_competes_for_experts(tiny_config, num_beams, fraction):
    config = tiny_config(vocab_size=9, decoder_sparse_step=1, moe_eval_capacity_token_fraction=fraction)
    model = make_model(config, seed=1)
    batches = []
    model.decoder.register_forward_pre_hook(lambda _, inputs: batches.append(len(inputs[0])))
    model.generate(torch.randint(3, 9, (6, 5)), num_beams=num_beams, max_new_tokens=12)
    first, *others = batches
    assert first == 6, "before the first choice, a sentence has one beam"
    assert num_beams == 1 or others[0] == 6 * num_beams
    assert others == sorted(others, reverse=True)
    assert (others[-1] < 6 * num_beams) == (fraction == 1)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_a_forced_token_that_leaves_no_choice(tiny_config, num_beams):
    model = make_model(tiny_config())
    source = torch.randint(3, 29, (2, 5))
    for forced, max_new_tokens in ((7, 1), (EOS, 1), (EOS, 8)):
        options = {"forced_bos_token_id": forced, "max_new_tokens": max_new_tokens}
        assert model.generate(source, num_beams=num_beams, **options).tolist() == [[START, forced]] * 2


@pytest.mark.parametrize("num_beams", [1, 3])
def test_no_sentences_give_no_translations(tiny_config, num_beams):
    source = torch.empty(0, 5, dtype=torch.long)
    generated = make_model(tiny_config()).generate(source, source != PAD, num_beams=num_beams)
    assert generated.shape[0] == 0
    assert generated.dtype == torch.long


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
def test_never_longer_than_requested_or_than_the_positions(tiny_config, num_beams):
    model = make_model(tiny_config(max_position_embeddings=6), end=-10.0)
    source = torch.randint(3, 29, (2, 5))
    assert model.generate(source, num_beams=num_beams, max_new_tokens=3).shape[1] == 4
    assert model.generate(source, num_beams=num_beams, max_new_tokens=100).shape[1] == 7


def test_training_mode_is_refused(tiny_config):
    with pytest.raises(ValueError, match=r"model\.eval\(\)"):
        make_model(tiny_config()).train().generate(torch.full((1, 2), 5))


@pytest.mark.parametrize("options", [{"num_beams": 0}, {"max_new_tokens": 0}])
def test_options_out_of_range_are_refused(tiny_config, options):
    with pytest.raises(ValueError, match="at least 1"):
        make_model(tiny_config()).generate(torch.full((1, 2), 5), **options)
