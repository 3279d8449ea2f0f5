"""Target and drafts: forwards over slot caches."""
