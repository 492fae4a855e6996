"""Reporters: they read results and snapshots, never guest or host."""
