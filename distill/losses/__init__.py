"""Losses as pure functions of (B, C, F, H, W) tensors: they draw nothing, own nothing and know no network."""
