"""Worlds whose law is known: what students are trained and judged on here."""
