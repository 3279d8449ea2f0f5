"""The drafts in use, and how they are replaced while they serve."""
