"""One sequence that is being decoded, and what a step plans for it."""
