"""Many cells at once: which tasks there are, who computes them, how long it takes, and what is kept."""
