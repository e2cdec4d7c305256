"""Unwind data, as it lies in a file or in a process: frame descriptions, rows, exception tables."""
