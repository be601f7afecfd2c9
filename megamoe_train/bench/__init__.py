"""Benchmarks: `python -m megamoe_train.bench TABLE`. Ours, honest baselines and cuBLAS, side by side."""
