"""Benchmarks: `python -m megamoe_train.bench gemm`. Ours, honest baselines and cuBLAS, side by side in one run."""
