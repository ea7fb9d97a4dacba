"""Checks of the package that are no tests: what the compiler makes, what is read, what is the same to the bit."""
