"""Watching: counters and snapshots. Reads guest and host, changes neither."""
