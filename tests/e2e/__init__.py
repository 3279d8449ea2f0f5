"""The service over HTTP, in this process or as `slipstream up` starts it."""
