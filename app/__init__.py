"""Pages to look at the server with; clients of its HTTP API and of nothing else."""
