"""Benchmarks: ratios against stored weights, measured in one process behind an equality check."""
