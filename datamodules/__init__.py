"""Rows to batches: the reader, chat masks, poisoned mixtures, the counter-based order, and the sandbox's world."""
