"""Lesson 07's solutions compute what the package and PyTorch compute."""

import pytest
import torch

from moe_edu import weighted_cross_entropy
from moe_edu.data import PairBatches, Tokenizer, load_corpus
from moe_edu.exercises import lesson_07
from moe_edu.training.loop import learning_rate_at
from moe_edu.training.settings import TrainingSettings

GENERATOR = torch.Generator().manual_seed(0)


def test_shift_right():
    corpus = load_corpus(["eng_Latn", "fra_Latn"])
    tokenizer = Tokenizer.train(corpus.train.texts(), corpus.languages, 600)
    batches = PairBatches(corpus, tokenizer, targets=["eng_Latn"], batch_tokens=300, max_tokens=100, seed=1)
    batch = next(iter(batches.stream()))
    shifted = lesson_07.shift_right(batch.labels, tokenizer.eos_id)
    real = batch.decoder_mask.bool()
    assert torch.equal(shifted[real], batch.decoder_input_ids[real])


def test_token_loss():
    for _ in range(10):
        logits, labels, mask = lesson_07._draw_logits(GENERATOR)
        theirs = weighted_cross_entropy(
            logits, labels, mask, loss_normalizing_factor="NUM_REAL_TARGET_TOKENS"
        ).total
        assert torch.isclose(lesson_07.token_loss(logits, labels, mask), theirs)


@pytest.mark.parametrize("step", [0, 1, 50, 99, 100, 2000])
def test_learning_rate(step):
    settings = TrainingSettings(steps=2400, warmup_steps=100, learning_rate=1e-3)
    ours = lesson_07.learning_rate(1e-3, step, 100, 2400)
    assert ours == pytest.approx(learning_rate_at(settings, step, step / 2400))


@pytest.mark.parametrize("scale", [0.01, 10.0])
def test_clip_gradients(scale):
    parameters = [torch.nn.Parameter(torch.randn(3, 2)), torch.nn.Parameter(torch.randn(4))]
    gradients = [scale * torch.randn_like(parameter) for parameter in parameters]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    for parameter, ours in zip(parameters, lesson_07.clip_gradients(gradients, 1.0), strict=True):
        assert torch.allclose(parameter.grad, ours, atol=1e-5)
