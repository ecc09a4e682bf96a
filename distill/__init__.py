"""Distillation: makes the student bundles that codmd_serve samples, and measures them."""
