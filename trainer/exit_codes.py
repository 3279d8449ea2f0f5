"""Exit codes by which a cycle's process tells its worker how the cycle ended."""

EXIT_LEASE_LOST = 3  # another worker has the cycle
EXIT_REPORTED = 4  # the cycle failed; the ledger has the reason, and queues it again
