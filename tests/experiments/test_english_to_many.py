import json
from dataclasses import asdict, replace

import pytest

from moe_edu.data import load_corpus
from moe_edu.experiments.english_to_many import (
    PLAN,
    SOURCE,
    SWEEP,
    EnglishToManySettings,
    model_fields,
    run,
    training_settings,
)
from moe_edu.experiments.sweep import by_cell, count_parameters, load_results, summarize
from moe_edu.model.translator import MoETranslator
from moe_edu.training.settings import small_config

QUICK = EnglishToManySettings(steps=3, batch_tokens=200)


@pytest.mark.parametrize("experts", [2, 16])
def test_active_work_is_equal_whatever_the_experts(experts):
    models = {e: MoETranslator(small_config(**model_fields(replace(QUICK, experts=e)))) for e in (1, experts)}
    total, active = count_parameters(models[experts], experts)
    dense_total, dense_active = count_parameters(models[1], 1)
    assert dense_total == dense_active == sum(p.numel() for p in models[1].parameters())
    assert total == sum(p.numel() for p in models[experts].parameters())
    # In addition to the dense twin's work, a token passes a router of D * E weights and a second output bias of D.
    assert active == dense_total + 128 * experts + 128
    assert (total == active) == (experts == 2)


def test_english_is_read_and_every_other_language_written():
    settings = training_settings(QUICK, ("fra_Latn", SOURCE, "ell_Grek"))
    assert settings.sources == (SOURCE,)
    assert settings.targets == ("fra_Latn", "ell_Grek")


def test_a_run_repeats_and_scores_every_language():
    corpus = load_corpus([SOURCE, "fra_Latn", "ell_Grek"])
    settings = replace(QUICK, experts=4)
    first, again = (run(settings, corpus, sentences=12) for _ in range(2))
    assert set(first["test_chrf_by_language"]) == {"fra_Latn", "ell_Grek"}
    assert set(SWEEP.measures) <= first.keys()
    for result in (first, again):
        result.pop("cpu_seconds")
    assert first == again
    json.dumps(first)


def test_the_shipped_results_are_of_this_plan():
    cells = by_cell(load_results(SWEEP.name)["runs"])
    plan = {cell: job for group in PLAN.values() for cell, job in group.items()}
    assert list(cells) == list(plan)
    for cell, results in cells.items():
        settings, seeds = plan[cell]
        assert [r["settings"] for r in results] == [
            asdict(replace(settings, seed=seed)) for seed in range(seeds)
        ], cell


@pytest.mark.parametrize("experts", [1, 16])
def test_both_are_compared_at_their_best_rate_on_the_validation_split(experts):
    cells = by_cell(load_results(SWEEP.name)["runs"])
    tried = {cell: runs for cell, runs in cells.items() if cell.startswith(f"experts-{experts}-rate-")}
    assert len(tried) >= 3
    tuned = max(tried, key=lambda cell: summarize(run["valid_chrf"] for run in tried[cell][:2]).mean)
    rates = sorted(runs[0]["settings"]["learning_rate"] for runs in tried.values())
    assert rates[0] < tried[tuned][0]["settings"]["learning_rate"] < rates[-1], (
        "the best rate is at an end of the "
    )
    "range"
    assert len(tried[tuned]) == 5
