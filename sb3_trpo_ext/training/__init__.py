"""The template of an algorithm: collect, check, update as one transaction, log."""
