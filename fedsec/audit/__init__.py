"""The audit of a trained model: what it gives away, beside what is claimed, beside what could not have been seen."""
