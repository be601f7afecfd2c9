"""`bench gemm`: the six grouped products beside torch._grouped_mm and cuBLAS, with and without our epilogues."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .. import ops
from .timing import CuBLAS, alternate


@dataclass(frozen=True)
class Shape:
    """Load of one rank: `experts` local experts with `rows` rows each on average."""

    hidden: int
    inter: int
    experts: int
    rows: int


SHAPES = {
    "flash": Shape(4096, 2048, 32, 1536),
    "pro": Shape(7168, 3072, 48, 1024),
    "e128": Shape(4096, 2048, 128, 384),
}
PRODUCTS = ("fc1", "fc2", "dgrad2", "dgrad1", "wgrad1", "wgrad2")
CLAMP = 10.0


def group_rows(shape: Shape, kind: str, seed: int) -> list[int]:
    """Rows of each expert: all equal, or as uniform random routing of as many slots gives."""
    if kind == "even":
        return [shape.rows] * shape.experts
    gen = torch.Generator().manual_seed(seed)
    ids = torch.randint(shape.experts, (shape.rows * shape.experts,), generator=gen)
    return torch.bincount(ids, minlength=shape.experts).tolist()


class Layer:
    """Pools, weights and gradients of one case. Two sets of inputs rotate; the baseline's rows lie without padding."""

    def __init__(self, shape: Shape, rows: list[int]):
        self.shape, self.rows = shape, rows
        self.groups, pool = ops.Groups.of(rows, "cuda", deadline_s=10.0)
        H, I, L = shape.hidden, shape.inter, shape.experts  # noqa: E741
        keep = torch.zeros(pool, 1, dtype=torch.bool, device="cuda")
        for begin, count in zip(self.groups.offset.tolist(), rows, strict=True):
            keep[begin : begin + count] = True
        self.keep = keep[:, 0]

        def pooled(columns):
            return [torch.randn(pool, columns, device="cuda").bfloat16() * keep for _ in range(2)]

        self.x, self.dy, self.a, self.dh, self.h = (pooled(c) for c in (H, H, I, 2 * I, 2 * I))
        self.packed = {}
        self.fc1 = (torch.randn(L, 2 * I, H, device="cuda") * H**-0.5).bfloat16()
        self.fc2 = (torch.randn(L, H, I, device="cuda") * I**-0.5).bfloat16()
        self.p = torch.rand(pool, device="cuda")
        self.out = {c: torch.empty(pool, c, device="cuda", dtype=torch.bfloat16) for c in {H, I, 2 * I}}
        self.partials = torch.empty(pool, -(-I // 256), device="cuda")
        self.grad1 = torch.zeros(L, 2 * I, H, device="cuda")
        self.grad2 = torch.zeros(L, H, I, device="cuda")
        kinds = ops.MapKind
        self.maps = {
            "fc1": ops.expert_maps(list(self.fc1), kinds.WEIGHT),
            "fc2": ops.expert_maps(list(self.fc2), kinds.WEIGHT),
            "dgrad2": ops.expert_maps(list(self.fc2), kinds.WEIGHT_MN),
            "dgrad1": ops.expert_maps(list(self.fc1), kinds.WEIGHT_MN),
            "wgrad1": ops.GradientTable.of(list(self.grad1)),
            "wgrad2": ops.GradientTable.of(list(self.grad2)),
        }
        self.ends = torch.tensor(rows, device="cuda").cumsum(0).int()

    def dense(self, name: str, i: int):
        """A pool's rows without padding, made once."""
        key = (name, i)
        if key not in self.packed:
            pool = getattr(self, name)[i]
            self.packed[key] = pool if self.keep.all() else pool[self.keep].contiguous()
        return self.packed[key]

    def operands(self, product: str) -> tuple[str, str | None]:
        """Names of the left pool and, for a wgrad, of the right one."""
        return {"fc1": ("x", None), "fc2": ("a", None), "dgrad2": ("dy", None), "dgrad1": ("dh", None),
                "wgrad1": ("dh", "x"), "wgrad2": ("dy", "a")}[product]  # fmt: skip

    def flops(self, product: str) -> float:
        per_row = {"fc1": 4, "dgrad1": 4, "wgrad1": 4}.get(product, 2)
        return per_row * sum(self.rows) * self.shape.hidden * self.shape.inter


def with_epilogue(layer: Layer, product: str):
    H, I, g, maps = layer.shape.hidden, layer.shape.inter, layer.groups, layer.maps[product]  # noqa: E741
    out, act = layer.out, layer.out[I]
    runs = {
        "fc1": lambda i: ops.fc1(layer.x[i % 2], maps, g, layer.p, out[2 * I], act, CLAMP),
        "fc2": lambda i: ops.fc2(layer.a[i % 2], maps, g, out[H]),
        "dgrad2": lambda i: ops.dgrad2(layer.dy[i % 2], maps, g, layer.h[i % 2], layer.p, out[2 * I], act,
                                       layer.partials, CLAMP),
        "dgrad1": lambda i: ops.dgrad1(layer.dh[i % 2], maps, g, out[H]),
        "wgrad1": lambda i: ops.wgrad(layer.dh[i % 2], layer.x[i % 2], maps, g, accumulate=True),
        "wgrad2": lambda i: ops.wgrad(layer.dy[i % 2], layer.a[i % 2], maps, g, accumulate=True),
    }  # fmt: skip
    return runs[product]


def without_epilogue(layer: Layer, product: str):
    """The bare product: rounded and stored; a wgrad stores fp32 instead of adding. None where that is the epilogue."""
    I, g, maps = layer.shape.inter, layer.groups, layer.maps[product]  # noqa: E741
    runs = {
        "fc1": lambda i: ops.fc2(layer.x[i % 2], maps, g, layer.out[2 * I]),
        "dgrad2": lambda i: ops.dgrad1(layer.dy[i % 2], maps, g, layer.out[I]),
        "wgrad1": lambda i: ops.wgrad(layer.dh[i % 2], layer.x[i % 2], maps, g, accumulate=False),
        "wgrad2": lambda i: ops.wgrad(layer.dy[i % 2], layer.a[i % 2], maps, g, accumulate=False),
    }
    return runs.get(product)


def grouped_mm(layer: Layer, product: str):
    """torch._grouped_mm on unpadded rows; its weight gradients are bf16."""
    left, right = layer.operands(product)
    if right is not None:
        return lambda i: torch._grouped_mm(layer.dense(left, i % 2).t(), layer.dense(right, i % 2), offs=layer.ends)
    weight = {"fc1": layer.fc1.mT, "fc2": layer.fc2.mT, "dgrad2": layer.fc2, "dgrad1": layer.fc1}[product]
    return lambda i: torch._grouped_mm(layer.dense(left, i % 2), weight, offs=layer.ends)


def measure(layer: Layer, product: str, iterations: int, paced: bool) -> dict[str, float]:
    """TFLOP/s of each candidate (bare products and adds count the same FLOPs) and shares of the alternating cuBLAS."""
    cublas = CuBLAS(layer.flops(product))
    candidates = {"cublas": cublas, "ours": with_epilogue(layer, product), "torch": grouped_mm(layer, product)}
    bare = without_epilogue(layer, product)
    if bare is not None:
        candidates["bare"] = bare
    times = alternate(candidates, iterations, paced=paced)
    rates = {name: layer.flops(product) / ms / 1e9 for name, ms in times.items()}
    rates["cublas"] = cublas.tflops(times["cublas"])
    return {**rates, "ms": times["ours"], "share": rates["ours"] / rates["cublas"]}


def row_text(row: dict) -> str:
    bare = f"{row['bare']:5.0f}" if "bare" in row else "    -"
    return (
        f"{row['shape']:6} {row['groups']:6} {row['product']:7} {row['mode']:9} {row['ms']:7.3f} {row['ours']:5.0f} "
        f"{bare} {row['torch']:5.0f} {row['cublas']:6.0f} {row['share']:6.1%}"
    )


def run(shapes: list[str], kinds: list[str], products: list[str], modes: list[str], iterations: int) -> list[dict]:
    """One row per shape, grouping, product and mode; prints each as it comes."""
    print(f"{'shape':6} {'groups':6} {'product':7} {'mode':9} {'ms':>7} {'ours':>5} {'bare':>5} {'torch':>5} "
          f"{'cuBLAS':>6} {'share':>6}   (TFLOP/s)")  # fmt: skip
    rows = []
    for shape in shapes:
        for kind in kinds:
            layer = Layer(SHAPES[shape], group_rows(SHAPES[shape], kind, seed=1))
            for product in products:
                for mode in modes:
                    result = measure(layer, product, iterations, paced=mode == "paced")
                    rows.append({"shape": shape, "groups": kind, "product": product, "mode": mode, **result})
                    print(row_text(rows[-1]), flush=True)
            del layer
            torch.cuda.empty_cache()
    return rows
