"""Data sets: what they are (`base`), where they come from (`load`), and who owns which image (`partition`)."""

from __future__ import annotations

from fedsec.data.base import Dataset
from fedsec.data.registry import catalogue, load, search_path

__all__ = ["Dataset", "catalogue", "load", "search_path"]
