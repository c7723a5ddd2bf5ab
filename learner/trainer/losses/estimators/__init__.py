"""Estimators: advantages from rewards alone, or of steps with the help of values."""
