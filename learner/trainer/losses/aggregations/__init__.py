"""Aggregations: from losses of tokens to this part of the loss of a whole batch."""
