"""Enumerations of what the serving functions emit."""
