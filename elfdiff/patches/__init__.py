"""Patch objects as files: written, checked, read back; and the evidence in them for people who ask why."""
