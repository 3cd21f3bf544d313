"""The frozen encoders that turn pixels and prompts into what the transformer trains on: an interface, a file each."""
