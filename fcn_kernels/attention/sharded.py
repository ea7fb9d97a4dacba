"""Set attention over rows that are spread over the ranks of a group: partial softmaxes, merged.

With lse_r, out_r and weight_sum_r of each rank's rows alone, and p_r = exp(lse_r - lse),

    lse = log sum_r exp(lse_r),  out = sum_r p_r out_r,  weight_sum = sum_r p_r weight_sum_r.

One exchange forward, of B H (C + 2) numbers from each rank. Backward each rank's rows get their gradients from the
merged lse alone; what queries and encoding get is summed, in one exchange more.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fcn_kernels.attention.inputs import Arriving, Inputs
from fcn_kernels.group import Group, gather, total

SEED_STEP = 0x9E3779B97F4A7C15  # ranks drop weights by seeds of their own, as rows have numbers within their rank alone


class ShardedAttention(torch.autograd.Function):
    """out (B, H, C) and weight_sum (B, H), the same on all ranks, from :class:`Inputs` with each rank's rows.

    Queries and encoding have to be the same on all ranks, and so has what is made of the results: what arrives in the
    backward pass is taken to be the same.
    """

    @staticmethod
    def forward(ctx: Any, group: Group, *args: Any) -> tuple[Tensor, Tensor]:
        p = Inputs(*args)
        if p.seed is not None:
            seed = (int(p.seed) + SEED_STEP * dist.get_rank(group)) % 2**63
            p = p._replace(seed=torch.tensor(seed, device="cpu"))
        out, weight_sum, lse = torch.ops.fcn_kernels.set_attention.default(*p)
        everyone = gather(torch.cat([out, weight_sum[..., None], lse[..., None]], -1), group)
        lses = everyone[..., -1]
        lse = lses.logsumexp(0)
        share = (lses - lse).exp().nan_to_num(0.0)[..., None]  # a set without rows has -inf
        merged = (share * everyone[..., :-1]).sum(0)
        out, weight_sum = merged[..., :-1].contiguous(), merged[..., -1].contiguous()
        *tensors, dropout, eps = p
        ctx.save_for_backward(*tensors, out, weight_sum, lse)
        ctx.constants = dropout, eps, group
        return out, weight_sum

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, grad_weight_sum: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise NotImplementedError(
                "set_attention has no second derivative. Call backward() without create_graph=True."
            )
        *tensors, out, weight_sum, lse = ctx.saved_tensors
        dropout, eps, group = ctx.constants
        delta = (grad_out * out).sum(-1) + grad_weight_sum * weight_sum
        arriving = Arriving(lse, grad_out.contiguous(), grad_weight_sum.contiguous(), delta)
        run = torch.ops.fcn_kernels.set_attention_backward.default
        queries, features, quality, encoding = run(*tensors, dropout, eps, *arriving)
        shared = total(torch.cat([queries.flatten(), encoding]), group)
        queries, encoding = shared[: queries.numel()].view_as(queries), shared[queries.numel() :]
        return None, queries, features, quality, encoding, *(None,) * (len(Inputs._fields) - 4)
