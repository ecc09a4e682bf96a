"""The Wan networks around the sampler: text, transformer, VAE, and the files they come from."""
