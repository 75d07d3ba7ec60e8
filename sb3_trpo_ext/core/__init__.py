"""The mathematics of trust-region policy optimisation: torch and the standard library only."""
