"""Value functions: objects that a model keeps, saves and restores."""
