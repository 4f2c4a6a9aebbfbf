"""Validation shared by the operators: every error names the operator, the argument and shapes."""

from __future__ import annotations

import torch

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_floats(
    operator: str,
    required: dict[str, torch.Tensor],
    optional: dict[str, torch.Tensor | None] | None = None,
    fp32: tuple[str, ...] = (),
) -> None:
    """Require tensors on one device, of one floating dtype; the optional ones may be None.

    Under ``torch.autocast`` dtypes may differ, as they may for PyTorch's own operations.

    Args:
        fp32: names of arguments that may be fp32 beside any other dtype.

    Raises:
        TypeError: an argument is not a tensor, not floating, or its dtype differs.
        ValueError: the arguments are on different devices.
    """
    given = {name: tensor for name, tensor in (optional or {}).items() if tensor is not None}
    first_name, first = "", None
    for name, tensor in {**required, **given}.items():
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{operator}: {name} must be a tensor, got {type(tensor).__name__}")
        if tensor.dtype not in FLOAT_DTYPES:
            raise TypeError(f"{operator}: {name} must be floating point, got {tensor.dtype}")
        if first is None:
            first_name, first = name, tensor
            continue
        if tensor.device != first.device:
            raise ValueError(
                f"{operator}: {name} is on {tensor.device}, but {first_name} is on {first.device}"
            )
        if tensor.dtype == first.dtype or (name in fp32 and tensor.dtype == torch.float32):
            continue
        mixed_fp64 = name in required and torch.float64 in (tensor.dtype, first.dtype)
        if mixed_fp64 or not autocast_enabled(first.device.type):
            raise TypeError(
                f"{operator}: {name} is {tensor.dtype}, but {first_name} is {first.dtype}; "
                "give one dtype, or run under torch.autocast (which leaves fp64 alone)"
            )


def autocast_enabled(device_type: str) -> bool:
    """Whether ``torch.autocast`` is in force for this type of device."""
    # Tensors without memory have none, and asking is an error. (`is_autocast_available` would
    # say so, but torch.compile does not trace it before PyTorch 2.12.)
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def autocast(tensor: torch.Tensor) -> torch.Tensor:
    """An operand as ``torch.autocast`` would give it to a matrix product; fp64 is left alone."""
    dtype = autocast_dtype(tensor)
    return tensor if tensor.dtype == dtype else tensor.to(dtype)  # to ask takes long, too


def autocast_dtype(tensor: torch.Tensor) -> torch.dtype:
    """The dtype that :func:`autocast` gives an operand."""
    if tensor.dtype == torch.float64 or not autocast_enabled(tensor.device.type):
        return tensor.dtype
    return torch.get_autocast_dtype(tensor.device.type)


def check_mask(operator: str, mask: torch.Tensor, like: torch.Tensor) -> None:
    """Require a boolean mask (True = real) on the device of ``like``."""
    if not isinstance(mask, torch.Tensor):
        raise TypeError(f"{operator}: mask must be a tensor, got {type(mask).__name__}")
    if mask.dtype != torch.bool:
        raise TypeError(f"{operator}: mask must be torch.bool (True = real), got {mask.dtype}")
    if mask.device != like.device:
        raise ValueError(f"{operator}: mask is on {mask.device}, the input is on {like.device}")


def check_shape(
    operator: str,
    name: str,
    tensor: torch.Tensor | None,
    expected: tuple[int, ...],
    letters: str,
    of: str,
) -> None:
    """Require ``tensor`` (where given) to have the shape ``expected``.

    Args:
        letters: the expected shape in letters, for the message: ``"[H, C]"``.
        of: what the numbers were taken from, for the message: ``"x of shape (2, 3)"``.
    """
    if tensor is not None and tuple(tensor.shape) != expected:
        raise ValueError(
            f"{operator}: {name} has shape {tuple(tensor.shape)}, expected {letters} = {expected} "
            f"for {of}"
        )


def check_dropout(
    operator: str, dropout: torch.Tensor | None, shape: tuple[int, ...], letters: str, of: str
) -> None:
    """Require what dropout multiplies by (where given) to broadcast to ``shape``, and no gradient.

    Args:
        letters, of: as in :func:`check_shape`.
    """
    if dropout is None:
        return
    if not broadcasts(tuple(dropout.shape), shape):
        raise ValueError(
            f"{operator}: dropout has shape {tuple(dropout.shape)}, expected one that broadcasts "
            f"to {letters} = {shape} for {of}"
        )
    if dropout.requires_grad:
        raise ValueError(
            f"{operator}: dropout of shape {tuple(dropout.shape)} requires a gradient, which it "
            "does not get; expected one without (dropout.detach())"
        )


def broadcasts(source: tuple[int, ...], target: tuple[int, ...]) -> bool:
    """Whether ``source`` broadcasts to ``target`` without enlarging it."""
    if len(source) > len(target):
        return False
    trailing = target[len(target) - len(source) :]
    return all(n in (1, m) for n, m in zip(source, trailing, strict=True))


def described(name: str, tensor: torch.Tensor) -> str:
    """A tensor in words, for an error message: ``x of shape (2, 3)``."""
    return f"{name} of shape {tuple(tensor.shape)}"
