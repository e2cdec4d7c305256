"""Apply, revert, check: all or nothing, on one process or on several."""
