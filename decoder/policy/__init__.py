"""What to draft, and how much: learnt from steps as they come."""
