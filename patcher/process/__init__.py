"""What a process is, as the kernel and its dynamic linker show it, and what can stand in the way of a patch."""
