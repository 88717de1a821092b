"""`import moe_edu` imports what the model needs and nothing else: modules are counted, not timed."""

import subprocess
import sys

ALLOWED = {"moe_edu", "numpy", "safetensors", "tokenizers"}
# Two small modules, which register the operators' FLOP formulas. A PyTorch built for CUDA imports its triton with them.
OF_TORCH = {"torch.utils.flop_counter", "torch.utils.module_tracker"}

SCRIPT = """
import sys, torch
before = set(sys.modules)
import moe_edu
print(" ".join(sorted(set(sys.modules) - before)))
"""


def test_import_brings_in_few_modules():
    run = subprocess.run([sys.executable, "-c", SCRIPT], check=True, capture_output=True, text=True)
    added = [name for name in run.stdout.split() if name.partition(".")[0] != "triton"]
    foreign = (
        {name.partition(".")[0] for name in added if name not in OF_TORCH}
        - ALLOWED
        - set(sys.stdlib_module_names)
    )
    assert not foreign, "`import moe_edu` now imports these modules: import them where they are used instead"
    assert "moe_edu.training.loop" not in added
    assert len(added) < 80
