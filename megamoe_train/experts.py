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


def places_of(matrices: Sequence[Tensor]) -> tuple[int, ...]:
    """Equal where as many matrices of one shape and dtype lie at the same addresses. Asked in every call."""
    if isinstance(matrices, StackedExperts):
        stack = matrices.stack
        return stack.data_ptr(), stack.stride(0), stack.dtype, *stack.shape
    return matrices[0].dtype, *matrices[0].shape, *[matrix.data_ptr() for matrix in matrices]


def per_expert(tensors: tuple[Tensor, ...] | list[Tensor]) -> Sequence[Tensor]:
    """One stack `[L, a, b]`, or L tensors `[a, b]`, as a sequence of L tensors `[a, b]`."""
    return StackedExperts(tensors[0]) if tensors[0].dim() == 3 else list(tensors)
