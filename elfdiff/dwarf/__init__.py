"""What debug information (DWARF) says of one build: units, functions, source lines, types."""
