"""A run as one HTML page: what it was, how its losses went, what it samples, and what its reference tokens show."""
