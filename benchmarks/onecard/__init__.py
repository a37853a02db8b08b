"""What benchmarks/gpu.py measures on one card, and with what."""
