"""Procedural worlds with a known law, on which students are trained and evaluated."""
