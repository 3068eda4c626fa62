"""Robust aggregation: one file a rule. What they share is in `fedsec.robust`."""
