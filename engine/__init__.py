"""Weights, passes and training of a causal language model, on one device or many."""
