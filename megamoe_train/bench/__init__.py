"""Benchmarks: `python -m megamoe_train.bench gemm|layer`. Ours, honest baselines and cuBLAS, side by side."""
