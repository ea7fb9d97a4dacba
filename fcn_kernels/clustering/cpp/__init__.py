"""Chunks in C++, for CPUs."""
