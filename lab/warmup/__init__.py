"""Drafts without traffic: a first draft for a target that nobody has queried yet."""
