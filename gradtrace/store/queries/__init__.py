"""What is asked of runs: values by name, steps and group, and what a run holds at all."""
