"""What runs on a GPU itself: every kernel variant against the reference, and its speed against a copy. Skipped where there is none."""

from __future__ import annotations

import pytest
import torch

from zcompile import kernel_bench
from zcompile.kernels import calls, gpu
from zcompile.kernels.catalogue import Variant, catalogue

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or HIP device, and there is none"),
]


@pytest.mark.parametrize("variant", catalogue(), ids=lambda variant: variant.name.replace(" ", "-"))
def test_equals_the_reference(variant: Variant) -> None:
    arch = gpu.arch(torch.device("cuda", 0))
    if not calls.supports(arch, variant.code):
        pytest.skip(f"{arch} has no {variant.code.kind} in hardware")
    for seed in range(4):
        case = variant.make(arch, seed=seed, device="cuda")
        gpu.run(case.call)
        torch.cuda.synchronize()
        assert case.wrong() == "", f"seed {seed}"


def test_formats_that_the_chip_lacks_are_refused() -> None:
    device = torch.device("cuda", 0)
    arch = gpu.arch(device)
    lacking = [kind for kind in ("e4m3fn", "e4m3fnuz") if calls.FP8.get(arch) != kind]
    assert lacking
    from zcompile.kernels.code import Code
    from zcompile.kernels.geometry import Geometry

    for kind in lacking:
        with pytest.raises(ValueError, match=arch):
            gpu.quantize([torch.ones(256, device=device)], Geometry.of_rows(1, (256,)), Code(kind))


@pytest.mark.slow
def test_each_kernel_gives_what_the_reference_gives_on_a_bucket_of_256_mib() -> None:
    """The bench refuses to measure what differs; its figures are printed, not tested."""
    found = kernel_bench.bench(elements=(kernel_bench.IN_CACHE,), repeats=3, inductor=False)["gpu"]
    print(found)
    assert len(found["results"]) == 14
