"""Sets whose rows are spread over several processes, GPUs or machines: the same picks as from one."""

from fcn_kernels.distributed.select import coreset_select

__all__ = ["coreset_select"]
