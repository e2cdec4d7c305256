"""Machine code: entry jumps and the remote stub. Knows neither ELF nor processes."""
