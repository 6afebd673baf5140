"""The checked and resolved run, its numbers before it starts, and the claims of a recipe. No torch."""
