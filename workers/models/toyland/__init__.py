"""toyland, the embedded default model: a Stable-Diffusion-format pipeline of a few MB that draws 32x32 animals."""
