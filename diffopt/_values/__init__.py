"""Plain values: pytrees, and the state that goes from step to step."""
