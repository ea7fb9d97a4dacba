"""Rows among their neighbors: exact nearest rows of a bank, what their cosines say, and scores aligned by it."""
