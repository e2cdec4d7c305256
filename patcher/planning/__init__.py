"""A patch made to fit one process: every byte that will be written, computed before any thread is stopped."""
