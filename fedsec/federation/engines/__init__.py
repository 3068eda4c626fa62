"""Engines: where the clients' turns are carried out."""
