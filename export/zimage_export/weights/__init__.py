"""Weights on their way into a bundle: streamed, folded and rebalanced."""
