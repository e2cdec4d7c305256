"""Upgrades: a process that runs old builds is patched to the builds that lie on disk now."""
