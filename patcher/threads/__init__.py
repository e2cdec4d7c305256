"""Holding the threads of a process: stopping them, looking at their registers, letting them go."""
