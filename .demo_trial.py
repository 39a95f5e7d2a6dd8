import sys,time,torch
from cges_kernels.demo.training import *
from cges_kernels.demo.data import load_digits
torch.set_num_threads(1)
im=load_digits()
s=Settings(epochs=int(sys.argv[1]),lr=float(sys.argv[2]),batch=int(sys.argv[3]))
for m,k in METHODS.items():
    for lam in k.lambdas(5)[::2]:
        t=time.time(); r=train(Job(m,lam,0),im,s)
        print(m,lam,f"acc {r.accuracy:.1f} nz {r.nonzero:.2f} fn {r.flops_nonzero:.2f} fc {r.flops_compacted:.2f} dg {r.dead_groups:.1f} du {r.dead_units:.1f} last {r.last_nonzero:.1f} cpf {r.classes_per_feature:.2f} t {time.time()-t:.2f}", flush=True)
