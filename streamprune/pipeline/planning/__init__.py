"""Before the loop: what a job will hold, write and take, and the job itself, resolved from a model and its settings."""
