"""The worker process: signals in; a better draft out."""
