"""The step as compiled code."""
