"""Error rates of gates, guards and choices over thousands of simulated requests."""
