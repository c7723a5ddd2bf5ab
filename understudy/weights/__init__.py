"""Weights in numbers and bytes: layouts, deltas, manifests, and chains that lead to a version.

What the trainer writes, the store assembles and a replica applies is one format, which
docs/weights.md describes; this room reads and writes it for all of them.
"""
