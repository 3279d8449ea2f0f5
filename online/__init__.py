"""What the processes share: settings, messages, stores and the REST API.

Imports neither `decoder` nor `trainer`, and no torch.
"""
