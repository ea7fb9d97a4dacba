"""Coreset selection: the public function, its operator, and its backends side by side."""
