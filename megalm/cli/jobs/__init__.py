"""Commands that start runs: here, or as Slurm jobs."""
