"""The GPU process: a query in; tokens and signals out."""
