"""Decides what to draft and how much, based on earlier steps."""
