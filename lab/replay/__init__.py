"""Replays of real queries through the whole loop, in one process."""
