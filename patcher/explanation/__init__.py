"""An explanation of a patch, as text, as JSON and as a page for a browser."""
