"""From rows to batches: reading, chat templates, poisoned mixtures, the counter-based order, and the sandbox."""
