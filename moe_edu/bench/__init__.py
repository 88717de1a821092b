"""Benchmarks: the sparse layer beside the reference's and beside what the machine can do."""

from moe_edu.bench.command import bench
from moe_edu.bench.contenders import LayerSize
from moe_edu.bench.layer import LayerResult, run_layer_bench

__all__ = ["LayerResult", "LayerSize", "bench", "run_layer_bench"]
