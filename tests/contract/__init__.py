"""One suite for every implementation of an interface, with real databases and Redis."""
