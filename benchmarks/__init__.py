"""Benchmarks of any op, any backend and any peer, from the cases that the tests read."""
