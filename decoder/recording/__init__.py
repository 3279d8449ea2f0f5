"""What a step saw becomes a signal."""
