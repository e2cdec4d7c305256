"""System calls that a thread of the target makes for us, and what is mapped into the target by them."""
