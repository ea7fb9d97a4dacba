"""What Cluster and Aggregate knows of an image beside its embedding: its style, and the code of the norm."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fcn_kernels import checks
from fcn_kernels.backends import without_autocast
from fcn_kernels.clustering.norm_code import code_table, norm_edges
from fcn_kernels.clustering.torch_backend import finite_rows, linear
from fcn_kernels.sets import accumulator
from fcn_kernels.transforms import is_transformed

HALF = (torch.float16, torch.bfloat16)


class _SingleBuffers(nn.Module):
    """Its buffers are float32 where it is of half precision, which would lose small changes of running means."""

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        if tensor is not None and tensor.dtype in HALF:  # the default dtype
            tensor = tensor.float()
        super().register_buffer(name, tensor, persistent)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = {name: value for name, value in self.named_buffers(recurse=False) if value is not None}
        super()._apply(fn, recurse)
        for name, value in before.items():
            cast = getattr(self, name)
            if cast.dtype in HALF:
                setattr(self, name, value.to(cast.device))
        return self


class RowNorm(_SingleBuffers, nn.BatchNorm1d):
    """Batch normalization of the rows of a call that take part, wherever they lie; what it holds of them."""


def kept_statistics(norm: nn.BatchNorm1d, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Copies of the running mean and variance (D,)."""
    mean, variance = norm.running_mean, norm.running_var
    assert mean is not None
    assert variance is not None
    return mean.to(dtype, copy=True), variance.to(dtype, copy=True)


@torch.no_grad()
def keep_statistics(norm: nn.BatchNorm1d, valid: Tensor, mean: Tensor, variance: Tensor) -> None:
    """Update the running statistics from those of the valid rows (T,), as nn.BatchNorm1d does it."""
    assert norm.momentum is not None
    count = valid.sum()
    momentum = (count > 0).double() * norm.momentum  # a call without rows changes nothing
    unbiased = variance * count / (count - 1).clamp(min=1)
    for running, value in ((norm.running_mean, mean), (norm.running_var, unbiased)):
        assert running is not None
        running.lerp_(value.to(running.dtype), momentum.to(running.dtype))
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked += count > 0


def check_more_than_one(valid: Tensor) -> None:
    """Raise ValueError for one row alone, which has no variance."""
    if checks.may_look(valid) and valid.sum() == 1:
        raise ValueError("expected more than one row in train(), whose batch normalization takes their variance")


def row_statistics(rows: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance (D,) of the rows (T, D) that are valid (T,); all have to be finite."""
    count = valid.sum().clamp(min=1)
    mean = rows.where(valid[:, None], 0).sum(0) / count
    return mean, (rows - mean).where(valid[:, None], 0).square().sum(0) / count


class StyleInput(nn.Module):
    r"""The style of an image from the statistics of a backbone's layers: the style input maker of CAFace.

    With the mean z_s0 and the deviation z_s1 of each of S channels, and f (S, 2) learned::

        y = prelu(z[:, 0] f[:, 0] + z[:, 1] f[:, 1])
        s = BatchNorm(W y + b)

    In ``eval()`` the normalization is folded into W and b. In ``train()`` it takes the statistics of the call's rows.
    A row with a value that is not finite has a style of NaN, no part in the statistics and no gradient.

    Args:
        channels: S, in all layers together.
        dim: of the style.

    Raises:
        TypeError, ValueError: a size is no integer of at least 1.

    Source: Kim et al., "Cluster and Aggregate: Face Recognition with Large Probe Set", NeurIPS 2022, section 3.1.

    Example:
        >>> statistics = torch.rand(20, 384, 2)  # of 20 images, as StyleFeatures takes them from a backbone
        >>> StyleInput(384).eval()(statistics).shape
        torch.Size([20, 64])
    """

    def __init__(self, channels: int = 384, dim: int = 64) -> None:
        super().__init__()
        channels, dim = checks.at_least_one("channels", channels), checks.at_least_one("dim", dim)
        self.mix = nn.Parameter(torch.empty(channels, 2).uniform_(-1, 1))
        self.prelu = nn.PReLU()
        self.linear = nn.Linear(channels, dim)
        self.norm = RowNorm(dim)

    def forward(self, statistics: Tensor, valid: Tensor | None = None) -> Tensor:
        """Statistics (..., S, 2) to styles (..., dim), float32, or float64 in a float64 module.

        Args:
            statistics: means and deviations, of a floating-point dtype.
            valid: (...) bool, rows that may enter the statistics of ``train()``; None: all.

        Raises:
            TypeError, ValueError: the statistics have another dtype or shape; or one row alone in ``train()``.
        """
        channels = self.mix.shape[0]
        if not isinstance(statistics, Tensor) or not statistics.is_floating_point():
            got = statistics.dtype if isinstance(statistics, Tensor) else type(statistics).__name__
            raise TypeError(f"expected statistics to be a floating-point Tensor, got {got}")
        if statistics.ndim < 2 or tuple(statistics.shape[-2:]) != (channels, 2):
            raise ValueError(f"expected statistics of shape (..., {channels}, 2), got {tuple(statistics.shape)}")
        dtype = accumulator(self.mix.dtype)
        z = statistics.reshape(-1, channels, 2).to(dtype)
        finite = finite_rows(z.flatten(1))
        if not checks.may_look(finite) or not finite.all():
            z = z.where(finite[:, None, None], 0)
        rows = finite if valid is None else finite & valid.reshape(-1)
        if self.norm.training:
            check_more_than_one(rows)
        with without_autocast(z.device.type):
            style = self._styles(z, rows)
        return style.where(finite[:, None], torch.nan).view(*statistics.shape[:-2], style.shape[1])

    def _styles(self, z: Tensor, valid: Tensor) -> Tensor:
        """(T, S, 2) to (T, dim). For the backward pass it keeps z alone, and runs again."""
        layer, norm, eps = self.linear, self.norm, self.norm.eps
        parameters = (self.mix, self.prelu.weight, layer.weight, layer.bias, norm.weight, norm.bias)
        training, (mean, variance) = norm.training, kept_statistics(norm, z.dtype)

        def run(z: Tensor, mean: Tensor, variance: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            mix, slope, weight, bias, gain, shift = (t.to(z.dtype) for t in parameters)
            mixed = F.prelu(z[..., 0] * mix[:, 0] + z[..., 1] * mix[:, 1], slope)
            if training:
                y = linear(mixed, weight, bias)
                mean, variance = row_statistics(y, valid)
                return (y - mean) / (variance + eps).sqrt() * gain + shift, mean, variance
            gain = gain / (variance + eps).sqrt()
            return linear(mixed, weight * gain[:, None], (bias - mean) * gain + shift), mean, variance

        if torch.is_grad_enabled() and not torch.compiler.is_compiling() and not is_transformed():
            out = checkpoint(run, z, mean, variance, *parameters, use_reentrant=False, preserve_rng_state=False)
        else:
            out = run(z, mean, variance, *parameters)
        if training:
            keep_statistics(norm, valid, *out[1:])
        style: Tensor = out[0]
        return style


class NormCode(_SingleBuffers):
    """The code of a row's norm: a row of a table of 61, of sinusoids (see :mod:`fcn_kernels.clustering.norm_code`)."""

    table: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = RowNorm(1, affine=False)
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("table", code_table(dim, torch.float32))

    def edges(self, norms: Tensor | None, valid: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The norms (60,) at which the code steps, which are constants: by the norms (T,) that are valid in train()."""
        mean, variance = kept_statistics(self.norm, torch.float64)
        if self.norm.training and norms is not None and valid is not None:
            check_more_than_one(valid)
            mean, variance = row_statistics(norms.detach().where(valid, 0)[:, None], valid)
            keep_statistics(self.norm, valid, mean, variance)
        return norm_edges(mean, variance, dtype)

    def rows(self, dtype: torch.dtype) -> Tensor:
        """(61, dim), scaled."""
        return self.scale.to(dtype) * self.table.to(dtype)


class StyleFeatures:
    """Statistics of some layers of a backbone, taken while it runs: what :class:`StyleInput` takes.

    Of each channel of a layer's map (B, S_i, H, W) the mean and the unbiased standard deviation; layers follow one
    another in the order given. CAFace takes the layers with 128 and 256 channels of an IR-101.

    Args:
        model: any module. layers: names of submodules, as ``model.named_modules()`` has them.

    Raises:
        ValueError: there is no such submodule; or, while the model runs, one gives no map with at least two values a
            channel; or ``features`` is asked for when not every layer has run.

    Example:
        >>> backbone = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 16, 3))
        >>> with StyleFeatures(backbone, ["0", "2"]) as style:
        ...     _ = backbone(torch.rand(4, 3, 32, 32))
        >>> style.features.shape
        torch.Size([4, 24, 2])
    """

    def __init__(self, model: nn.Module, layers: Sequence[str]) -> None:
        modules = dict(model.named_modules())
        missing = [name for name in layers if name not in modules]
        if missing or not layers:
            raise ValueError(
                f"expected names of at least one submodule of {type(model).__name__}, got {missing or layers}"
            )
        self._model, self._layers = model, {name: modules[name] for name in layers}
        self._taken: dict[str, Tensor] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> StyleFeatures:
        # a layer that a later run passes by must not lend it what an earlier one gave
        self._handles.append(self._model.register_forward_pre_hook(lambda *_: self._taken.clear()))
        for name, module in self._layers.items():
            self._handles.append(module.register_forward_hook(self._hook(name)))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _hook(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def take(module: nn.Module, given: Any, output: Any) -> None:
            if not isinstance(output, Tensor) or output.ndim != 4 or output.shape[2] * output.shape[3] < 2:
                got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
                raise ValueError(f"expected a map (B, S, H, W) of two values and more from {name}, got {got}")
            channel = output.flatten(2).to(accumulator(output.dtype))
            deviation, mean = torch.std_mean(channel, dim=-1)
            self._taken[name] = torch.stack([mean, deviation], -1)

        return take

    @property
    def features(self) -> Tensor:
        """(B, S, 2), mean and deviation, of the model's last run."""
        missing = [name for name in self._layers if name not in self._taken]
        if missing:
            raise ValueError(f"expected every layer to have run, got nothing from {missing}")
        return torch.cat([self._taken[name] for name in self._layers], 1)
