"""What the serving functions emit, by enumeration; compiles them."""
