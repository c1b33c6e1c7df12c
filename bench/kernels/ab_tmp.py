import importlib, statistics, sys, torch, gc
from types import SimpleNamespace
from attention_cases import *
from attention_peers import cleared, K
from codegen.kernels.paged_attention import triton as kernel
P="codegen.kernels.paged_attention."
mods={n:importlib.import_module(P+n) for n in ("gluon_const","gluon","gluon_nt")}
flush=torch.empty(1<<30,dtype=torch.uint8,device="cuda")
def build(problem, mod=None, ht=None, stages=None, pieces=None):
    inputs=SimpleNamespace(**{**vars(problem.inputs),"memo":{}})
    h,t=kernel._hopper,kernel._heads_together
    kernel._hopper=lambda d,hh: mod
    if stages: st,kernel.CHUNK_STAGES=kernel.CHUNK_STAGES,stages
    try: ours(Problem(**{**vars(problem),"inputs":inputs}),kernel)
    finally:
        kernel._hopper=h
        if stages: kernel.CHUNK_STAGES=st
    def run():
        kernel._heads_together=(lambda hh,p: ht) if ht else t
        r=kernel.paged_attention(problem.q_TNH,problem.k_pages,problem.v_pages,problem.k_pages,inputs,problem.scale)[0]
        kernel._heads_together=t
        return r
    return run
def go(case, variants, rounds=12):
    p=make(case)
    runs={"fa3":flash_attention_3(case,p)}
    for name,kw in variants.items(): runs[name]=build(p,**kw)
    errs={n:relative_error(case,p,r(),rows=4) for n,r in runs.items()}
    cl={n:cleared(r,flush) for n,r in runs.items()}
    for c in cl.values(): c()
    ts={n:[] for n in cl}; order=list(cl)
    for i in range(rounds):
        for n in (order if i%2 else order[::-1]): ts[n].append(cl[n]())
    print(case.name,case.queries,case.keys,case.batch,case.heads, {n:(round(statistics.median(t),1), round(statistics.median(a/b for a,b in zip(ts["fa3"],t)),3), f"{errs[n]:.1e}") for n,t in ts.items()},flush=True)
    del p,runs,cl; gc.collect(); torch.cuda.empty_cache()
V={"const":dict(mod=mods["gluon_const"]),"rt":dict(mod=mods["gluon"]),"nt":dict(mod=mods["gluon_nt"])}
V8={**V,"rt_h1":dict(mod=mods["gluon"],ht=1),"rt_h8":dict(mod=mods["gluon"],ht=8)}
for h in (64,32):
    for q,k in ((512,128),(2048,128),(8192,8),(32768,32)):
        go(Case(name="c",queries=q,keys=k*K,heads=h), V8 if h==64 or q>8000 else V)
    for q,k in ((32,128),(32,1024)):
        go(Case(name="c",queries=q,keys=k*K,heads=h), V)
T={"p3":dict(mod=None,stages=3),"p2":dict(mod=None,stages=2),"p3_h8":dict(mod=None,stages=3,ht=8),"p3h1":dict(mod=None,stages=3,ht=1)}
for q,k in ((8192,8),(32768,32)): go(Case(name="port",queries=q,keys=k*K), T)
