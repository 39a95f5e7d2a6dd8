// One path of the kernels for rows as a kernel of its own, so that test_cuda_compile.py can count its
// instructions. It has no bound on registers, because it holds more elements there than the product does.
#include "cuda/kernels.cuh"

using namespace cges;
using namespace cges::cuda;

template <typename T, bool plain>
__global__ void path(const __grid_constant__ StepTableOf<T, Sgd, true> table) {
  CGES_SHARED(memory);
  const Strip strip = table.strips[blockIdx.x];
  const auto& h = table.of(strip.tensor);
  step_strip<T, plain, true>(table, strip, plain ? h : h.resolved(table.loss_scale.grad_scale),
                             reinterpret_cast<Sums<Compute<T>>*>(memory));
}
template __global__ void path<float, PLAIN>(const __grid_constant__ StepTableOf<float, Sgd, true>);
template __global__ void path<__nv_bfloat16, PLAIN>(
    const __grid_constant__ StepTableOf<__nv_bfloat16, Sgd, true>);
