"""The statistics in C++, for CPUs."""
