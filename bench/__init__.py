"""Measurements; nothing here is a test, and nothing is asserted."""
