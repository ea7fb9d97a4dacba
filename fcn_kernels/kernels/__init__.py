"""Triton device code and launch geometry. Nothing outside this folder imports triton."""
