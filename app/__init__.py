"""Web pages for the server; they use its HTTP API only."""
