// One step of the CPU executor, for callgrind: guard GROUP_BY DTYPE MODE ROWS COLUMNS COUNT VECTOR_BYTES.
// The program defines the few functions of torch that the executor calls, for one thread, so that nothing but c10
// is loaded and every run executes the same instructions.
#include <ATen/Parallel.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "cpu/executor.h"

namespace at {
int get_num_threads() { return 1; }
int get_thread_num() { return 0; }
bool in_parallel_region() { return false; }
void init_num_threads() {}
namespace internal {
void set_thread_num(int) {}
}  // namespace internal
}  // namespace at

namespace {

template <typename T>
std::vector<T> normal(int64_t n, uint32_t seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> distribution;
  std::vector<T> values(n);
  for (T& value : values) value = T(distribution(generator));
  return values;
}

template <typename T>
void step(const std::string& group_by, bool exact, int64_t rows, int64_t columns, int64_t count) {
  const cges::Layout layout = group_by == "feature"   ? cges::Layout{1, rows, columns, 1}
                              : group_by == "filter"  ? cges::Layout{rows, columns, 1, 1}
                              : group_by == "channel" ? cges::Layout{1, rows, columns / 9, 9}
                              : group_by == "tensor"  ? cges::Layout{1, rows * columns, 1, 1}
                                                      : cges::Layout{1, 1, rows * columns, 1};
  const double n = layout.group_size();
  cges::Hyperparameters h;
  h.sgd = {0.1, 0.9, 1.0, 0.0, 1.0};
  if (group_by != "none") h.coefficients = {0.5 * std::sqrt(n), (exact ? 10.0 : 5.0) / n, 0.0};
  h.exact = exact;
  const int64_t elements = layout.numel() * count;
  std::vector<T> w = normal<T>(elements, 1), grad = normal<T>(elements, 2), buf = normal<T>(elements, 3);
  const auto dtype = std::is_same_v<T, float>       ? cges::DType::f32
                     : std::is_same_v<T, c10::Half> ? cges::DType::f16
                                                    : cges::DType::bf16;
  const cges::TensorShape shape{layout, group_by != "none", dtype, -1, 0};
  std::vector<cges::cpu::StepTensor> tensors;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t at = i * layout.numel();
    const cges::TensorInStep arrays{&w[at], &grad[at], {&buf[at]}, cges::Phase::running};
    tensors.push_back({shape, arrays, &h});
  }
  cges::cpu::step(tensors);
  double left = 0;
  for (const T& value : w) left += double(value) != 0;
  std::printf("%.3f of the weights are left\n", left / elements);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 8) return std::fprintf(stderr, "expected 7 arguments, got %d\n", argc - 1), 2;
  const std::string dtype = argv[2];
  cges::cpu::limit_vector_bytes(std::atoll(argv[7]));
  const auto run = dtype == "bf16" ? step<c10::BFloat16> : dtype == "fp16" ? step<c10::Half> : step<float>;
  run(argv[1], std::string(argv[3]) == "exact", std::atoll(argv[4]), std::atoll(argv[5]),
      std::atoll(argv[6]));
}
