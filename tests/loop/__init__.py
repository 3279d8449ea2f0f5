"""A training cycle with its worker process."""
