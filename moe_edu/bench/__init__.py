"""Benchmarks: the sparse layer compared with other libraries and with the machine's limits."""

from moe_edu.bench.contenders import LayerSize
from moe_edu.bench.layer import LayerResult, run_layer_bench

__all__ = ["LayerResult", "LayerSize", "run_layer_bench"]
