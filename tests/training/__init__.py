"""Losses, training and recipes on tiny models."""
