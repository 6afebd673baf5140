"""Commands that check a configuration by running it."""
