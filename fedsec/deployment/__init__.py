"""The same cells on several machines: an app for Flower's SuperLink and SuperNodes, and how it is written."""
