"""What a patched process carries, so that whoever comes next finds it: records and gates."""
