"""Batch norm over all processes."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from trainer.distributed.reduce import world_size


class _Normalize(torch.autograd.Function):
    """Batch norm with the mean and variance of all processes' elements (Ioffe & Szegedy, 2015, over N processes)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        dims = [d for d in range(x.dim()) if d != 1]
        wide = x if x.dtype == torch.float64 else x.float()
        if x.numel():
            variance, mean = torch.var_mean(wide, dims, correction=0)
        else:  # this process may have no elements, e.g. no region with an object: nan would spread to all others
            variance = mean = torch.zeros(x.shape[1], dtype=wide.dtype, device=x.device)
        count = torch.full_like(mean[:1], x.numel() // x.shape[1])
        local = torch.cat([count, mean, variance])
        gathered = torch.empty(world_size() * local.numel(), dtype=local.dtype, device=local.device)
        dist.all_gather_into_tensor(gathered, local)
        counts, means, variances = gathered.view(world_size(), -1).split([1, x.shape[1], x.shape[1]], dim=1)
        elements = counts.sum().clamp(min=1)
        mean = (counts * means).sum(0) / elements
        variance = (counts * (variances + (means - mean) ** 2)).sum(0) / elements  # Chan et al., 1979
        ctx.save_for_backward(x, weight, mean, variance, elements)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, variance, elements)
        return F.batch_norm(x, mean, variance, weight, bias, training=False, eps=eps), mean, variance, elements

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
        x, weight, mean, variance, elements = ctx.saved_tensors
        dims = [d for d in range(x.dim()) if d != 1]
        shape = [1, -1] + [1] * (x.dim() - 2)
        wide = gradient.to(mean.dtype)
        inverse = torch.rsqrt(variance + ctx.eps)
        normalized = (x.to(mean.dtype) - mean.view(shape)) * inverse.view(shape)
        local = torch.cat([wide.sum(dims), (wide * normalized).sum(dims)])
        summed = local.clone()
        dist.all_reduce(summed)
        mean_gradient, mean_product = (summed / elements).chunk(2)
        scale = inverse if weight is None else inverse * weight.to(mean.dtype)
        into = (wide - mean_gradient.view(shape) - normalized * mean_product.view(shape)) * scale.view(shape)
        for_bias, for_weight = local.chunk(2)
        if weight is None:
            return into.to(x.dtype), None, None, None
        return into.to(x.dtype), for_weight.to(weight.dtype), for_bias.to(weight.dtype), None


class GlobalBatchNorm(_BatchNorm):
    """Batch norm with the statistics of the micro-batch over all processes; on CPUs and GPUs alike.

    Its parameters, buffers and keys are those of the module it replaces; in eval mode it behaves like that module.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        pass

    def forward(self, input: Tensor) -> Tensor:
        """Normalises (B, C, …) over everything but C."""
        if not self.training or world_size() == 1:
            return super().forward(input)
        output: Tensor
        output, mean, variance, elements = _Normalize.apply(input, self.weight, self.bias, self.eps)
        if (
            self.track_running_stats
            and self.running_mean is not None
            and self.running_var is not None
            and self.num_batches_tracked is not None
        ):
            with torch.no_grad():
                self.num_batches_tracked += 1
                momentum = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
                unbiased = variance * (elements / (elements - 1).clamp(min=1))
                for running, new in ((self.running_mean, mean), (self.running_var, unbiased)):
                    # Without elements the running statistics stay.
                    running.lerp_(new.to(running.dtype), momentum * (elements > 1).to(running.dtype))
        return output


def use_global_batch_norm(model: nn.Module) -> None:
    """Makes every batch norm of `model` a `GlobalBatchNorm`, in place: parameters, buffers and hooks stay."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.__class__ = GlobalBatchNorm
