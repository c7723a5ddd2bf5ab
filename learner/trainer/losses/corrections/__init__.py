"""Corrections: weights of tokens that another policy sampled, without gradient."""
