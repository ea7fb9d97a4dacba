"""Plain PyTorch, written to be read beside the papers. Tests and benchmarks judge ``fcn_kernels`` against it."""
