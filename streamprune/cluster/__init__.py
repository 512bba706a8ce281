"""Many jobs on a cluster: which ones, as a script for Slurm, and how far each has come."""
