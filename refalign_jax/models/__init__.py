"""The networks: Wan DiT with reference branch, Wan VAE, UMT5, DINOv3."""
