"""Two ELF files in, one patch object out. Knows nothing of processes."""
