"""What the user calls, and what the call returns."""
