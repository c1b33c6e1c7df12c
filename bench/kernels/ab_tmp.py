import importlib, statistics, torch, gc
from types import SimpleNamespace
from bench.kernels.attention_cases import *
from bench.kernels.attention_peers import cleared, K

P = "codegen.kernels.paged_attention."
A = importlib.import_module(P + "triton")
B = importlib.import_module(P + "triton_b")
flush = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")


def build(
    problem,
    kernel=A,
    gluon=False,
    rows=None,
    keys=None,
    stages=None,
    warps=None,
    resident=None,
    ht=None,
):
    inputs = SimpleNamespace(**{**vars(problem.inputs), "memo": {}})
    h, cf = kernel._hopper, kernel.chunk_form

    def form(heads, device, longest):
        f = cf(heads, device, longest)
        if rows:
            f = kernel.Form(
                rows=rows,
                keys=keys,
                tile_tokens=rows // heads.group,
                stages=stages,
                warps=warps,
                resident=resident,
            )
        return f

    if not gluon:
        kernel._hopper = lambda d, hh: None
    kernel.chunk_form = form
    try:
        ours(Problem(**{**vars(problem), "inputs": inputs}), kernel)
    finally:
        kernel._hopper, kernel.chunk_form = h, cf
    return lambda: kernel.paged_attention(
        problem.q_TNH, problem.k_pages, problem.v_pages, problem.k_pages, inputs, problem.scale
    )[0]


V = {
    "run": dict(),
    "const": dict(kernel=B),
    "c2": dict(kernel=B, rows=128, keys=128, stages=2, warps=8, resident=1),
    "64x64s3": dict(rows=64, keys=64, stages=3, warps=4, resident=2),
    "64x64s2": dict(rows=64, keys=64, stages=2, warps=4, resident=2),
    "64x64c": dict(kernel=B, rows=64, keys=64, stages=3, warps=4, resident=2),
    "128x64s3": dict(rows=128, keys=64, stages=3, warps=8, resident=1),
    "128x64c": dict(kernel=B, rows=128, keys=64, stages=4, warps=8, resident=1),
    "64x128s2": dict(rows=64, keys=128, stages=2, warps=4, resident=1),
    "gluon": dict(gluon=True),
}
for q, k in ((8192, 8), (32768, 32), (512, 128)):
    case = Case(name="port", queries=q, keys=k * K)
    p = make(case)
    runs = {"fa3": flash_attention_3(case, p)}
    for n, kw in V.items():
        try:
            runs[n] = build(p, **kw)
        except Exception as e:
            print(n, repr(e)[:200])
    errs = {n: relative_error(case, p, r(), rows=4) for n, r in runs.items()}
    cl = {n: cleared(r, flush) for n, r in runs.items()}
    for c in cl.values():
        c()
    ts = {n: [] for n in cl}
    order = list(cl)
    for i in range(10):
        for n in order if i % 2 else order[::-1]:
            ts[n].append(cl[n]())
    print(
        q,
        k,
        {
            n: (
                round(statistics.median(t), 1),
                round(statistics.median(a / b for a, b in zip(ts["fa3"], t)), 3),
                f"{errs[n]:.1e}",
            )
            for n, t in ts.items()
        },
        flush=True,
    )
    del p, runs, cl
    gc.collect()
    torch.cuda.empty_cache()
