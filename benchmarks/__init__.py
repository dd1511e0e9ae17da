"""How fast it is: python -m benchmarks step --config configs/mmnist.yml."""
