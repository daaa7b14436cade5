"""Diffusion models: the noise schedule, the networks, samplers, and the distance of samples from real images."""
