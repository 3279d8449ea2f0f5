"""Proposals, and what the target accepts of them."""
