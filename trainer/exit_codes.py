"""How a cycle's process tells its worker what became of it."""

EXIT_LEASE_LOST = 3  # another worker has the cycle
EXIT_REPORTED = 4  # it failed, and has put the cycle back with the reason
