"""The loop: queries in, steps, deltas out."""
