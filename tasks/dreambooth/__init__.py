"""DreamBooth (Ruiz et al., 2023, arXiv 2208.12242): a subject taught to Stable Diffusion from a few pictures."""
