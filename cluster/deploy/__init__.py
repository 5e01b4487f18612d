"""Manifests of a cluster and of what runs on it, all made from one description: `python -m cluster render`."""
