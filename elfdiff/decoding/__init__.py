"""The code of one build: its functions, their instructions, and what these refer to."""
