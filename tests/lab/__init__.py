"""The lab: its arithmetic, and its commands on tiny models."""
