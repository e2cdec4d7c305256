"""The pause, in which a plan is carried out, and the wait until no thread is in its way."""
