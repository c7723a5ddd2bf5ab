"""Benchmarks: each prints one JSON line a case. `make bench` runs all."""
