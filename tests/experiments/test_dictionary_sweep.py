import json
from dataclasses import asdict, replace

import pytest
import torch
from click.testing import CliRunner

from moe_edu.data import load_dictionary
from moe_edu.experiments.dictionary import (
    CURVE_EVERY,
    EOS,
    PAD,
    UNKNOWN,
    ConceptClassifier,
    DictionarySettings,
    Spelling,
    learning_rate_at,
    new_spellings,
    run,
    shuffled_batches,
    train_model,
)
from moe_edu.experiments.dictionary_sweep import PLAN, SWEEP
from moe_edu.experiments.sweep import (
    by_cell,
    count_parameters,
    load_results,
    make_command,
    missing_runs,
    summarize,
)

QUICK = DictionarySettings(steps=50, warmup=10, batch=64, experts=4)


@pytest.fixture(scope="module")
def small():
    """Forty concepts in six languages."""
    whole = load_dictionary()
    languages = ("deu_Latn", "nld_Latn", "rus_Cyrl", "ukr_Cyrl", "hin_Deva", "eng_Latn")

    def keep(entries):
        return tuple(e for e in entries if e.concept < 40 and e.language in languages)

    return replace(
        whole,
        concepts=whole.concepts[:40],
        emoji=whole.emoji[:40],
        languages=languages,
        train=keep(whole.train),
        valid=keep(whole.valid),
        test=keep(whole.test),
    )


def test_names_are_spelled_out(small):
    spelling = Spelling(small)
    entry = small.train[0]
    names = spelling.encode([entry, entry._replace(name="龍"), small.train[1]._replace(name="a")])
    symbols = {i: symbol for symbol, i in spelling.ids.items()}
    row = names.ids[0, : names.lengths[0]].tolist()
    assert [symbols[i] for i in row[:-1]] == [entry.language, *entry.name]
    assert row[-1] == EOS
    assert names.ids[1, :3].tolist() == [spelling.ids[entry.language], UNKNOWN, EOS]
    assert (names.ids[1, 3:] == PAD).all()
    shorter = names.take(torch.tensor([1, 2]))
    assert shorter.ids.shape == (2, 3)
    assert shorter.concepts.tolist() == [entry.concept, small.train[1].concept]


def test_padding_changes_nothing(small):
    spelling = Spelling(small)
    names = spelling.encode(small.train[:8])
    for experts in (1, 4):
        torch.manual_seed(0)
        model = ConceptClassifier(replace(QUICK, experts=experts), spelling.size, 40).eval()
        alone = torch.cat([model(names.take(torch.tensor([i])).ids)[0] for i in range(8)])
        torch.testing.assert_close(model(names.ids)[0], alone, rtol=1e-4, atol=1e-5)


def test_batches_hold_every_name_about_once_per_epoch(small):
    names = Spelling(small).encode(small.train)
    numbered = names._replace(concepts=torch.arange(len(names.concepts)))
    batches = shuffled_batches(numbered, 16, torch.Generator().manual_seed(0))
    epoch = torch.cat([next(batches).concepts for _ in range(len(names.concepts) // 16)])
    assert len(set(epoch.tolist())) == len(epoch)
    assert epoch.tolist() != sorted(epoch.tolist())


@pytest.mark.parametrize("experts", [1, 2, 8])
def test_active_work_is_equal_whatever_the_experts(small, experts):
    spelling = Spelling(small)
    settings = replace(QUICK, experts=experts)
    model = ConceptClassifier(settings, spelling.size, 40)
    total, active = count_parameters(model, experts)
    dense = replace(QUICK, experts=1)
    dense_total, _ = count_parameters(ConceptClassifier(dense, spelling.size, 40), 1)
    assert total == sum(p.numel() for p in model.parameters())
    # In addition to the dense twin's work, a character passes a router of D * E weights and a second output bias of D.
    extra = 0 if experts == 1 else settings.layers * settings.d_model * (experts + 1)
    assert active == dense_total + extra
    assert (total == active) == (experts <= 2)


def test_the_schedule_warms_up_and_ends_at_zero():
    settings = DictionarySettings(steps=1000, warmup=100, learning_rate=1.0)
    rates = [learning_rate_at(settings, step) for step in range(1000)]
    assert rates[0] == pytest.approx(0.01)
    assert max(rates) == max(rates[95:105]) > 0.97
    assert rates[-1] < 1e-5


def test_a_run_learns_and_repeats(small):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, again = (run(QUICK, small) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    assert len(first["loss_curve"]) == QUICK.steps // CURVE_EVERY
    assert first["recall"] > 0.25 > 5 / 40
    for result in (first, again):
        result.pop("cpu_seconds")
    assert first == again
    assert run(replace(QUICK, seed=1), small)["loss_curve"] != first["loss_curve"]
    json.dumps(first)


def test_only_a_sparse_model_reports_routing_and_a_tight_capacity_drops(small):
    few = replace(QUICK, steps=2)
    assert "dropped_choices" not in run(replace(few, experts=1), small)
    loose, tight = (run(replace(few, capacity_factor=c), small) for c in (4.0, 0.25))
    assert loose["dropped_choices"] == 0 < tight["dropped_choices"] < 1
    assert all(0.25 <= busiest <= 1 for busiest in loose["busiest_expert"])


def test_a_trained_model_names_the_training_names(small):
    trained = train_model(replace(QUICK, steps=100), small)
    known = [e for e in small.train if e.language == "deu_Latn"]
    logits, routing = trained.model.eval()(trained.spelling.encode(known).ids)
    right = (logits.argmax(1) == torch.tensor([e.concept for e in known])).float().mean()
    assert right > 0.5
    assert len(routing) == 2


def test_new_spellings_are_those_of_no_training_name():
    dictionary = load_dictionary()
    new = new_spellings(dictionary)
    assert 0.5 < new.float().mean() < 0.95
    known = {(e.concept, e.name.casefold()) for e in dictionary.train}
    for entry, is_new in zip(dictionary.test, new.tolist(), strict=True):
        assert ((entry.concept, entry.name.casefold()) in known) != is_new


def test_a_sweep_resumes_and_is_collected(small, monkeypatch, tmp_path):
    seen = []

    def run_small(settings):
        seen.append(settings)
        return run(replace(settings, batch=32), small)

    main = make_command(replace(SWEEP, run=run_small))
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    out = tmp_path / "runs"
    command = ["run", "--out", str(out), "--steps", "2", "--cell", "experts-1", "--cell", "experts-4"]
    runner = CliRunner()
    assert runner.invoke(main, [*command, "--seeds", "1"]).exit_code == 0
    assert runner.invoke(main, [*command, "--seeds", "2"]).exit_code == 0
    assert [(s.experts, s.seed) for s in seen] == [(1, 0), (4, 0), (1, 1), (4, 1)]
    collected = runner.invoke(main, ["collect", str(out), "--to", str(tmp_path / "all.json")])
    assert "experts-4" in collected.output
    results = json.loads((tmp_path / "all.json").read_text())
    assert [(r["cell"], r["settings"]["seed"]) for r in results["runs"]] == [
        ("experts-1", 0),
        ("experts-1", 1),
        ("experts-4", 0),
        ("experts-4", 1),
    ]
    wrong = runner.invoke(main, ["run", "--out", str(out), "--cell", "experts-3"])
    assert wrong.exit_code == 2
    assert "no cell 'experts-3'" in wrong.output


def test_a_summary_says_how_many_runs_it_has():
    assert summarize([1.0, 3.0]) == (2.0, pytest.approx(2**0.5), 2)
    assert summarize([1.0, 3.0]).text(1) == "2.0 ± 1.4"
    assert summarize([1.0]).text() == "1.000 (one run)"


def test_the_shipped_results_are_of_this_plan():
    cells = by_cell(load_results(SWEEP.name)["runs"])
    plan = {cell: job for group in PLAN.values() for cell, job in group.items()}
    assert list(cells) == list(plan)
    for cell, results in cells.items():
        settings, seeds = plan[cell]
        assert len(results) == seeds
        for seed, result in enumerate(results):
            assert result["settings"] == asdict(replace(settings, seed=seed)), cell
            assert set(SWEEP.measures) <= result.keys()


def test_the_shipped_results_support_the_lesson():
    cells = by_cell(load_results(SWEEP.name)["runs"])
    recall = {cell: summarize(r["recall"] for r in results) for cell, results in cells.items()}
    test = {cell: summarize(r["test"] for r in results) for cell, results in cells.items()}
    rising = [recall[f"experts-{e}"].mean for e in (2, 4, 8, 16, 32)]
    assert rising == sorted(rising)
    # More experts remember more, far beyond the spread over seeds; their guesses on unseen pairs improve far less.
    gain = recall["experts-32"].mean - recall["experts-1"].mean
    assert gain > 10 * max(recall["experts-32"].deviation, recall["experts-1"].deviation)
    assert abs(test["experts-32"].mean - test["experts-1"].mean) < gain / 10
    # The placebo, which routes nothing, hardly differs from dense.
    assert abs(recall["experts-2"].mean - recall["experts-1"].mean) < gain / 10


def test_a_shortened_run_is_not_part_of_the_sweep(tmp_path):
    """The full run is still missing, and collecting both is refused."""
    (*_, shorter), (*_, whole) = (missing_runs(PLAN, tmp_path, steps=steps)[0] for steps in (3, None))
    shorter.write_text("{}", "utf-8")
    assert missing_runs(PLAN, tmp_path)[0][-1] == whole
    result = next(iter(load_results(SWEEP.name)["runs"]))
    for path in (shorter, whole):
        path.write_text(json.dumps(result), "utf-8")
    done = CliRunner().invoke(
        make_command(SWEEP), ["collect", str(tmp_path), "--to", str(tmp_path / "all.json")]
    )
    assert done.exit_code == 1
    assert "more than once" in done.output
    assert not (tmp_path / "all.json").exists()
