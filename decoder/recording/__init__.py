"""From what a step observes to a signal in the buffer."""
