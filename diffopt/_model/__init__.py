"""A module with other values standing in it."""
