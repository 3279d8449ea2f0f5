"""Drafts without traffic: how a target gets a first draft before anybody has asked it anything."""
