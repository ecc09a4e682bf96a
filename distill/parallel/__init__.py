"""Processes, shards and what they say to each other."""
