"""One run: the command, the loop, and what it leaves on disk."""
