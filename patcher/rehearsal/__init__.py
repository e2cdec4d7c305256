"""Rehearsals: an old build is started, loaded, patched, probed and reverted, from a file that says how."""
