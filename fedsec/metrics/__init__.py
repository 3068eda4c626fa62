"""Pure functions that turn scores, images and updates into numbers with intervals."""
