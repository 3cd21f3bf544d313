"""The demo: photographs learned and sampled on a CPU, with numbers that say how well."""
