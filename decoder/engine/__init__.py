"""The engine's thread, and the batch of sequences that it steps."""
