"""The operations as modules."""
