"""Commands about jobs of a cluster."""
