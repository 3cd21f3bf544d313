"""A page in the browser on which videos are asked for, watched and kept."""
