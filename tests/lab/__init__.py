"""The lab's commands on tiny models."""
