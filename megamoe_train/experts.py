"""The weights of local experts, given as one stack or as one tensor an expert, seen as a sequence of L matrices."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor


class StackedExperts(Sequence):
    """`[L, a, b]` as L matrices `[a, b]`, whose views are made only where somebody asks for one."""

    def __init__(self, stack: Tensor):
        self.stack = stack
        self._views: tuple[Tensor, ...] | None = None

    def __len__(self) -> int:
        return self.stack.shape[0]

    def __getitem__(self, index):
        if self._views is None:
            self._views = self.stack.unbind(0)
        return self._views[index]

    def __iter__(self) -> Iterator[Tensor]:
        self[0:0]
        return iter(self._views)

    def addresses(self) -> range | list[int]:
        """Where each matrix begins."""
        first, step = self.stack.data_ptr(), self.stack.stride(0) * self.stack.element_size()
        return [first + step * i for i in range(len(self))]


def place_of(weights: Sequence[Tensor]) -> tuple[int, ...]:
    """Address and shape of the first matrix."""
    if isinstance(weights, StackedExperts):
        return weights.stack.data_ptr(), *weights.stack.shape[1:]
    return weights[0].data_ptr(), *weights[0].shape


def per_expert(tensors: tuple[Tensor, ...] | list[Tensor]) -> Sequence[Tensor]:
    """One stack `[L, a, b]`, or L tensors `[a, b]`, as a sequence of L tensors `[a, b]`."""
    return StackedExperts(tensors[0]) if tensors[0].dim() == 3 else list(tensors)
