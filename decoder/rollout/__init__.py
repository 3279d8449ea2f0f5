"""Draft versions in service: what is live, how it is replaced, and what decides about it."""
