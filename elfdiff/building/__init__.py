"""What goes into a patch: which functions, where each of their references leads, and why each is in it."""
