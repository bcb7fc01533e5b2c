"""The loop as a value; snapshots; the first pass and the way back."""
