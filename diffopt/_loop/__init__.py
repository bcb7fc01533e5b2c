"""The loop, its first pass and its way back; snapshots; running a plan."""
