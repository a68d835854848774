"""Objectives: pure functions that turn per-token log-probabilities `[T]` into a scalar loss."""
