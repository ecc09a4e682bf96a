"""The job store: every accepted job, its state and its result; SQLite or PostgreSQL. Knows neither HTTP nor devices."""
