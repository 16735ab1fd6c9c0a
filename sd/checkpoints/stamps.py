"""Whether weights have been written to or replaced since somebody looked."""

from collections.abc import Iterable

from torch import Tensor, nn


def address(tensor: Tensor) -> int:
    """Where a tensor's numbers are. Subclasses (quantized weights) have no address of their own: they are replaced."""
    return tensor.data_ptr() if type(tensor) in (Tensor, nn.Parameter) else id(tensor)


def stamp(tensors: Iterable[Tensor]) -> tuple[tuple[int, int], ...]:
    """Differs once a tensor was replaced or written to; those stamped must stay alive meanwhile.

    Inference tensors do not count their changes: whoever writes to one must not expect it to be seen.
    """
    return tuple((address(t), -1 if t.is_inference() else t._version) for t in tensors)
