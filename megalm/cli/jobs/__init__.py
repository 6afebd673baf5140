"""Commands about runs in number: as Slurm jobs, as sweeps, at a glance."""
