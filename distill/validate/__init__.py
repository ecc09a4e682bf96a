"""Suites of validation: which samples of the student are drawn during a run, and how they are scored."""
