"""Benchmarks of time and memory: python -m benchmarks step --config configs/mmnist.yml."""
