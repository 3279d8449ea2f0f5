"""The real engine on tiny models."""
