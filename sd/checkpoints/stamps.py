"""Whether weights have been written to or replaced since somebody looked."""

import weakref
from collections.abc import Callable, Iterable

from torch import Tensor, nn


def address(tensor: Tensor) -> int:
    """Where a tensor's numbers are. Subclasses (quantized weights) have no address of their own: they are replaced."""
    return tensor.data_ptr() if type(tensor) in (Tensor, nn.Parameter) else id(tensor)


class Stamp:
    """How some tensors are: equal to a later one of them as long as none was replaced or written to.

    What is written through `tensor.data` is not counted, nor to tensors that were made in inference mode; `touch` says
    that it was done.
    """

    def __init__(self, tensors: Iterable[Tensor]):
        self.entries = [(_reference(tensor), address(tensor), _version(tensor)) for tensor in tensors]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Stamp) or len(self.entries) != len(other.entries):
            return False
        pairs = zip(self.entries, other.entries, strict=True)
        return all(a[1:] == b[1:] and a[0]() is not None and a[0]() is b[0]() for a, b in pairs)

    __hash__ = None


def _reference(tensor: Tensor) -> Callable[[], object]:
    """Which tensor it is: one that is freed leaves its address to another.

    Not of subclasses, which Module.to cannot exchange while somebody refers to them.
    """
    return weakref.ref(tensor) if type(tensor) in (Tensor, nn.Parameter) else lambda: True


def _version(tensor: Tensor) -> int:
    try:
        return tensor._version
    except RuntimeError:  # made in inference mode
        return -1


def touch(tensors: Iterable[Tensor]) -> None:
    """Count these as written to."""
    for tensor in tensors:
        if not tensor.is_inference():
            tensor.detach()[:0].zero_()  # in place, of no numbers
