import cProfile,pstats,torch
from cges_kernels.demo.training import *
from cges_kernels.demo.data import load_digits
torch.set_num_threads(1)
im=load_digits(); s=Settings(epochs=30)
train(Job("cges",.0164,0),im,Settings(epochs=1))
p=cProfile.Profile(); p.runcall(train,Job("cges",.0164,0),im,s)
pstats.Stats(p).sort_stats("tottime").print_stats(16)
