"""Decides what to draft and how much, from what earlier steps took and accepted."""
