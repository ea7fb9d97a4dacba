"""Selection on a CPU, in C++."""
