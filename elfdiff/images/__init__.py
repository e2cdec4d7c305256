"""Linked ELF files as they will lie in memory."""
