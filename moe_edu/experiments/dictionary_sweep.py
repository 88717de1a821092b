"""Run the pocket dictionary over experts, rates, capacities and controls, with one JSON file per run:

python -m moe_edu.experiments.dictionary_sweep run --out runs        # resumes: finished runs are kept
python -m moe_edu.experiments.dictionary_sweep collect runs --to results.json
python -m moe_edu.experiments.dictionary_sweep table                 # the results that ship
"""

from __future__ import annotations

from dataclasses import replace

from moe_edu.experiments.dictionary import DictionarySettings, run
from moe_edu.experiments.sweep import Plan, Sweep, make_command

BASE = DictionarySettings()
PLAN: Plan = {
    "experts": {f"experts-{e}": (replace(BASE, experts=e), 5) for e in (1, 2, 4, 8, 16, 32)},
    # The dense twin with the additional cost of 32 experts: their processor time, or the router's multiplications
    # (32 * 24 per character and layer, as many as those of 16 more hidden units).
    "controls": {
        "dense-equal-time": (replace(BASE, experts=1, steps=3000), 3),
        "dense-router-work": (replace(BASE, experts=1, dense_width=64), 3),
    },
    # As many feed-forward weights as 16 experts, all active, at its own learning rate.
    "wide": {
        f"dense-wide-rate-{rate:g}": (replace(BASE, experts=1, dense_width=384, learning_rate=rate), 3)
        for rate in (0.01, 0.02, 0.04)
    },
    "rate": {
        f"experts-{e}-rate-{rate:g}": (replace(BASE, experts=e, learning_rate=rate), 3)
        for rate in (0.005, 0.04, 0.01)
        for e in (1, 16)
    },
    "capacity": {
        f"experts-16-capacity-{c:g}": (replace(BASE, experts=16, capacity_factor=c), 3) for c in (0.5, 1.0)
    },
    "balance": {"experts-16-balance-0": (replace(BASE, experts=16, balance=0.0), 3)},
}
SWEEP = Sweep(
    name="dictionary_sweep",
    base=BASE,
    plan=PLAN,
    run=run,
    measures={"recall": 3, "test": 3, "test_new_spelling": 3, "cpu_seconds": 1},
)
main = make_command(SWEEP)

if __name__ == "__main__":
    main()
