"""Ways to propose tokens."""
