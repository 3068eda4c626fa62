"""The federation: who takes part, what is shared, and the five steps of a round (see `round`)."""
