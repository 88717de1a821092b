"""Shards and the processes that compute them: one process gives the same weights as several."""

import itertools
import os
import platform
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moe_edu.data import Batch, PairBatches, Tokenizer, load_corpus
from moe_edu.model.translator import MoETranslator
from moe_edu.training.settings import TrainingSettings, small_config
from moe_edu.training.shards import add_gradients, bind_parameters, cut_shards, seeded
from moe_edu.training.trainer import Trainer, start_workers
from moe_edu.training.workers import deal

BALLAST_MB = 500
SETTINGS = TrainingSettings(batch_tokens=300, vocab_size=600, seed=3)
SETTINGS_OF_THREE = TrainingSettings(batch_tokens=300, vocab_size=600, seed=3, shards=3)


def make_model(**fields) -> MoETranslator:
    torch.manual_seed(0)
    defaults = {
        "vocab_size": 600,
        "d_model": 32,
        "encoder_ffn_dim": 32,
        "decoder_ffn_dim": 32,
        "num_experts": 4,
    }
    return MoETranslator(small_config(**{**defaults, **fields}))


@pytest.fixture(scope="module")
def batches() -> list[Batch]:
    corpus = load_corpus(["eng_Latn", "fra_Latn", "ell_Grek"])
    tokenizer = Tokenizer.train(corpus.train.texts(), corpus.languages, 600)
    stream = PairBatches(corpus, tokenizer, batch_tokens=300, seed=1).stream()
    return [next(stream) for _ in range(6)]


@pytest.fixture(scope="module")
def source(batches) -> tuple[torch.Tensor, torch.Tensor]:
    return batches[0].source_ids, batches[0].source_mask


def train_steps(model: MoETranslator, batches: list[Batch], settings: TrainingSettings, processes: int):
    with start_workers(model, settings, processes) as workers:
        trainer = Trainer(model, settings, workers=workers)
        outcomes = [trainer.step(batch, 1e-2) for batch in batches]
        return trainer.weights.detach().clone(), outcomes


def test_processes_change_nothing(batches):
    """Results agree bit for bit with everything random: dropout, LayerDrop, second experts, expert output masking."""
    fields = {
        "dropout": 0.1,
        "encoder_layerdrop": 0.3,
        "second_expert_policy": "sampling",
        "moe_token_dropout": 0.2,
        "encoder_sparse_step": 1,
    }
    shards = 3
    settings = TrainingSettings(shards=shards, seed=3)
    few = [
        batches[0],
        batches[1].split(len(batches[1]))[0],
        *batches[2:],
    ]  # one batch of a single pair among them
    alone, expected = train_steps(make_model(**fields), few, settings, 1)
    together, outcomes = train_steps(make_model(**fields), few, settings, shards)
    assert torch.equal(alone, together)
    for mine, theirs in zip(outcomes, expected, strict=True):
        assert torch.equal(torch.stack(list(mine.loss)), torch.stack(list(theirs.loss)))
        assert len(mine.expert_metrics) == len(theirs.expert_metrics)
        assert mine.expert_load.keys() == theirs.expert_load.keys()
    assert any(len(outcome.expert_metrics) != 2 * shards for outcome in outcomes), "LayerDrop never acted"


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_processes_change_nothing_in_half_precision(batches, precision):
    """Its gradients are scaled, and its statistics may have a dtype that NumPy lacks."""
    settings = replace(SETTINGS, precision=precision)
    model_fields = {"router_dtype": "bfloat16"}
    alone, expected = train_steps(make_model(**model_fields), batches, settings, 1)
    together, outcomes = train_steps(make_model(**model_fields), batches, settings, 2)
    assert torch.equal(alone, together)
    for mine, theirs in zip(outcomes, expected, strict=True):
        for ours, reference in zip(mine.expert_metrics, theirs.expert_metrics, strict=True):
            assert torch.equal(ours.router_confidence, reference.router_confidence)


def test_workers_ignore_the_folder_and_what_libraries_print(batches, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.path", [part or os.getcwd() for part in sys.path])
    monkeypatch.chdir(tmp_path)
    Path("queue.py").write_text("raise SystemExit('this is not the standard library')\n")
    monkeypatch.setenv("MKL_VERBOSE", "1")  # MKL then prints each of its products
    train_steps(make_model(), batches[:1], SETTINGS, 2)


def test_random_numbers_depend_on_the_seed_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    draws = []
    for _ in range(2):
        with seeded(5, torch.device("cpu")):
            draws.append(torch.rand(3))
    assert torch.equal(*draws)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.gpu
def test_random_numbers_depend_on_the_seed_alone_on_a_gpu():
    last = torch.device("cuda", torch.cuda.device_count() - 1)
    draws = []
    for seed in (5, 5, 6):
        with seeded(seed, last):
            draws.append(torch.rand(3, device=last))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_gradient_is_the_mean_over_all_target_tokens(batches):
    """Without experts, a batch cut into shards has the gradient of the whole batch."""
    model = make_model(encoder_sparse_step=0).double()
    gradients = []
    for parts in (1, 3):
        model.zero_grad()
        shards = cut_shards(batches[0], parts, seed=0, step=0)
        assert len(shards) == parts
        assert sum(shard.weight for shard in shards) == pytest.approx(1)
        for shard in shards:
            add_gradients(model, shard, SETTINGS)
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for whole, cut in zip(*gradients, strict=True):
        torch.testing.assert_close(cut, whole)


def test_each_shard_has_its_own_capacity(batches):
    model = make_model()
    capacities = []
    for shard in cut_shards(batches[0], 2, seed=0, step=0):
        routing = model.encoder(shard.batch.source_ids, shard.batch.source_mask).routing[1]
        capacities.append(routing.capacity)
        assert routing.num_tokens == shard.batch.source_ids.numel()
    whole = model.encoder(batches[0].source_ids, batches[0].source_mask).routing[1].capacity
    assert max(capacities) < whole


def test_split_keeps_every_pair_and_trims_padding(batches):
    batch = batches[0]
    parts = batch.split(3)
    assert sum(part.num_tokens for part in parts) == batch.num_tokens
    assert sorted(code for part in parts for code in part.source_languages) == sorted(batch.source_languages)
    for part in parts:
        assert part.source_mask.any(dim=0).all(), "a column contains only padding"
        assert part.decoder_mask.any(dim=0).all()
        rows = {tuple(row[row != 1].tolist()) for row in batch.source_ids}
        assert {tuple(row[row != 1].tolist()) for row in part.source_ids} <= rows
    assert len(batch.split(10**6)) == len(batch)


def test_steps_leave_the_callers_random_state(batches):
    trainer = Trainer(make_model(dropout=0.1), SETTINGS)
    before = torch.get_rng_state()
    trainer.step(batches[0], 1e-3)
    assert torch.equal(torch.get_rng_state(), before)


def test_shards_and_steps_draw_different_dropout(batches):
    seeds = [shard.seed for step in (0, 1) for shard in cut_shards(batches[0], 2, seed=0, step=step)]
    assert len(set(seeds)) == 4


def test_parameters_stay_views_of_one_tensor(batches):
    model = make_model()
    values = [parameter.detach().clone() for parameter in model.parameters()]
    size = sum(value.numel() for value in values)
    weights, gradients = torch.cat([value.flatten() for value in values]), torch.zeros(size)
    bind_parameters(model, weights, gradients)
    for parameter, value in zip(model.parameters(), values, strict=True):
        assert torch.equal(parameter, value)
    add_gradients(model, cut_shards(batches[0], 1, seed=0, step=0)[0], SETTINGS)
    assert torch.equal(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]), gradients)
    weights.zero_()
    assert not any(parameter.any() for parameter in model.parameters())


def test_a_workers_peak_is_its_own_and_not_its_parents():
    """How much memory a worker takes depends on the builds of Python and PyTorch; this holds for all of them."""
    with start_workers(make_model(), SETTINGS, 2) as workers:
        usual = workers.peak_memory_mb()
    ballast = torch.ones(BALLAST_MB * 10**6, dtype=torch.uint8)  # in memory while the worker starts
    with start_workers(make_model(), SETTINGS, 2) as workers:
        del ballast
        assert usual > 0
        assert abs(workers.peak_memory_mb() - usual) < BALLAST_MB / 2


def test_a_worker_that_dies_is_named_and_none_is_left(batches):
    threads = torch.get_num_threads()
    with start_workers(make_model(), SETTINGS, 2) as workers:
        (process,) = workers._processes
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        with pytest.raises(RuntimeError, match="a worker process ended with status -9"):
            workers.start(cut_shards(batches[0], 2, seed=0, step=0)[1:])
        with pytest.raises(RuntimeError, match="a worker process ended with status -9"):
            workers.finish(1)
    assert torch.get_num_threads() == threads


def test_workers_end_with_the_run(batches):
    model = make_model()
    with start_workers(model, SETTINGS, 2) as workers:
        processes = list(workers._processes)
        Trainer(model, SETTINGS, workers=workers).step(batches[0], 1e-3)
    assert [process.poll() for process in processes] == [0]
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters()), (
        "the weights outlive them"
    )


@pytest.mark.parametrize("processes", [3, 5])
def test_processes_must_fit_the_shards(processes):
    with pytest.raises(ValueError, match="processes must be 1 or the number of shards, 2"):
        start_workers(make_model(), SETTINGS, processes)


class TestGenerate:
    """`WorkerPool.generate` returns the same as one process."""

    @pytest.mark.parametrize("num_beams", [1, 3])
    @pytest.mark.parametrize("first", [None, 5])
    def test_all_processes_return_the_same_as_one(self, source, num_beams, first):
        model = make_model().eval()
        options = {"num_beams": num_beams, "forced_bos_token_id": first, "max_new_tokens": 6}
        expected = model.generate(*source, **options)
        with start_workers(model, SETTINGS_OF_THREE, 3) as workers:
            assert torch.equal(workers.generate(*source, **options), expected)
            single = workers.generate(source[0][:1], source[1][:1], **options)
        width = int((expected[0] != 1).sum())
        assert torch.equal(single[0][:width], expected[0][:width])

    def test_a_run_translates_with_the_weights_of_its_last_step(self, batches, source):
        model = make_model(dropout=0.5)
        with start_workers(model, SETTINGS, 2) as workers:
            trainer = Trainer(model, SETTINGS, workers=workers)
            before = model.eval().generate(*source, max_new_tokens=6)
            for batch in batches:
                trainer.step(batch, 3e-2)
            model.eval()
            together = workers.generate(*source, max_new_tokens=6)
            assert torch.equal(together, model.generate(*source, max_new_tokens=6))
            assert together.shape != before.shape or not torch.equal(together, before), "nothing was learnt"
            # Back in training mode, with dropout, in all processes.
            losses = [trainer.step(batches[0], 0.0).loss.total for _ in range(2)]
            assert losses[0] != losses[1]
        # A translator that outlives the workers works without them.
        model.eval()
        assert torch.equal(workers.generate(*source, max_new_tokens=6), together)

    def test_sentences_that_compete_for_experts_stay_together(self, source):
        model = make_model(moe_eval_capacity_token_fraction=0.1).eval()
        alone = model.generate(*source, max_new_tokens=6)
        sizes = []
        model.encoder.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
        with start_workers(model, SETTINGS, 2) as workers:
            assert torch.equal(workers.generate(*source, max_new_tokens=6), alone)
        assert sizes == [len(source[0])]


@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize("lengths", [[3], [5, 5], [100, 1, 1], [1, 2, 3, 4, 5, 6, 7, 8], [4] * 7])
def test_deal_gives_each_part_similar_lengths_and_about_equal_tokens(lengths, parts):
    lengths = torch.tensor(lengths)
    dealt = deal(lengths, parts)
    assert 1 <= len(dealt) <= parts
    assert sorted(torch.cat(dealt).tolist()) == list(range(len(lengths)))
    for longer, shorter in itertools.pairwise(dealt):
        assert lengths[longer].min() >= lengths[shorter].max()
    for rows in dealt:
        assert 0 < lengths[rows].sum() <= lengths.sum() / parts + lengths.max()


def test_a_worker_keeps_its_memory_from_step_to_step():
    """New pages would cost a tenth of a step."""
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("another C library has thresholds of its own")
    settings = TrainingSettings()
    corpus = load_corpus(["eng_Latn", "fra_Latn", "ell_Grek"])
    tokenizer = Tokenizer.train(corpus.train.texts(), corpus.languages, 600)
    stream = PairBatches(corpus, tokenizer, batch_tokens=settings.batch_tokens, seed=1).stream()
    with start_workers(MoETranslator(small_config()), settings, 2) as workers:

        def new_pages(steps: int) -> int:
            before = minor_faults(workers._processes[0].pid)
            for step in range(steps):
                shards = cut_shards(next(stream), 2, settings.seed, step)
                workers.start(shards[1:])
                workers.finish(1)
            return minor_faults(workers._processes[0].pid) - before

        new_pages(10)
        assert new_pages(10) < 10 * 100  # its logits alone take 500 pages


def minor_faults(process: int) -> int:
    """Pages that the process has received so far without reading a disk: field 10 of `/proc/PID/stat`."""
    return int(Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[7])
