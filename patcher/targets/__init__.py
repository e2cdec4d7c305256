"""The processes that a command is about: which they are, whether they can be patched, what is seen in one."""
