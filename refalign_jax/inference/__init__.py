"""From a prompt and references to a video: requests, then generate, then outputs."""
