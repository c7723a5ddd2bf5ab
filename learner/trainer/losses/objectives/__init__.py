"""Objectives: losses of tokens, with gradient through the log-probabilities alone."""
