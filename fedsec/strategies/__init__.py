"""Federated strategies of medical imaging, one file a family; found through the entry-point group fedsec.strategies."""
