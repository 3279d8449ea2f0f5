"""Decides what to draft and how much, by what earlier steps show."""
