"""Stable Diffusion 1.5, written by hand and made fast. Start at `sd.pipeline.StableDiffusion`."""
