"""Benchmarks of a training iteration."""
