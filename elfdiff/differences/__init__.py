"""What differs between two builds, and whether that is a change."""
