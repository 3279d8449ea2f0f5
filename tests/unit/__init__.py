"""Functions and objects: no model, no server, no other process."""
