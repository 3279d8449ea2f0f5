"""Drafters propose candidate tokens. Each lives in one file, and `registry` finds it."""
