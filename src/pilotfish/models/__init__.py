"""Latent diffusion models: the protocol, one file for each family, and what they share."""
