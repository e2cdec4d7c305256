"""Patches live processes: looks, stops, commits, resumes; and the command line."""
