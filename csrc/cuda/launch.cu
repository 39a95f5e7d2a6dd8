// The CUDA executor's host side: what a device allows, the arguments of a step, its launches. A step of every
// parameter of a model is up to three kernels per dtype; docs/design/cuda-executor.md says which, and why.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "cuda/kernels.cuh"

namespace cges::cuda {
namespace {

int64_t shared_limit = INT64_MAX, multiprocessors_limit = INT64_MAX;

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("cuda executor: ") + what + ": " + cudaGetErrorString(error));
}

template <typename F>
void with_type(DType dtype, F f) {
  switch (dtype) {
    case DType::f32:
      return f.template operator()<float>();
    case DType::f64:
      return f.template operator()<double>();
    case DType::bf16:
      return f.template operator()<__nv_bfloat16>();
    case DType::f16:
      return f.template operator()<__half>();
  }
}

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
  return value;
}

struct Launch {
  Launch(const Launch&) = delete;  // config points at cooperative
  cudaLaunchConfig_t config{};
  cudaLaunchAttribute cooperative{};

  // `together`: no block starts unless all can run at once.
  Launch(int64_t blocks, int threads, int64_t shared, bool together, void* stream) {
    config.gridDim = dim3(unsigned(blocks));
    config.blockDim = dim3(unsigned(threads));
    config.dynamicSmemBytes = size_t(shared);
    config.stream = static_cast<cudaStream_t>(stream);
    cooperative.id = cudaLaunchAttributeCooperative;
    cooperative.val.cooperative = 1;
    config.attrs = &cooperative;
    config.numAttrs = together ? 1 : 0;
  }
};

std::string version(int number) {
  return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10);
}

template <typename Kernel>
cudaError_t allow_shared(Kernel kernel, int64_t bytes) {
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes));
}

template <typename A>
ParamGroup<A> to_param_group(const Hyperparameters& h) {
  const Coefficients<double>& bare = h.coefficients;
  const Thresholds<double> thresholds =
      h.device.any() ? Thresholds<double>{bare.group_lasso, bare.exclusive_lasso, bare.l1} : h.thresholds();
  return {h.sgd.as<A>(), thresholds.as<A>(), h.nesterov, h.exact, h.freeze, h.device};
}

// Whether a step whose phase is running is of the kind that has a path of its own: nothing is asked for
// that only few ask for, and every number is known on the host.
bool is_plain(const Hyperparameters& h, const LossScale& loss_scale) {
  return !h.nesterov && h.freeze == Freeze::none && !h.searches() && !h.device.any() &&
         loss_scale.grad_scale == nullptr;
}

// Returns whether all of the step is plain.
template <typename A, int bytes>
bool fill(StepTable<A, bytes>& table, const Step& step) {
  static_assert(sizeof(table) <= bytes && StepTable<A, bytes>::kParamGroups > 0);
  bool all_plain = !step.work.ones;
  table.tiles = step.tiles;
  table.tile_count = int32_t(step.work.tiles.size());
  table.tiles_in_parts = step.work.tiles_in_parts;
  table.slots = step.work.slots;
  table.z_passes = step.work.z_passes;
  table.chunks = step.chunks;
  table.scratch = static_cast<unsigned char*>(step.scratch);
  table.counters = step.counters;
  table.panels = step.work.panels;
  table.strips = step.strips;
  table.loss_scale = step.loss_scale;
  table.stages = 1;
  for (size_t i = 0; i < step.hyperparameters.size(); ++i) {
    const Hyperparameters& h = step.hyperparameters[i];
    table.param_groups[i] = to_param_group<A>(h);
    if (h.searches()) table.stages = ShrinkageSolver<A>::kMaxSweeps;
  }
  table.tickets = int32_t(step.work.chunks.size() * (table.stages + 1));
  for (size_t i = 0; i < step.tensors.size(); ++i) {
    TensorAddresses& tensor = table.tensors[i] = step.tensors[i];
    // What a step lacks lies where w does: an address to count from, never read.
    if (tensor.grad == nullptr) tensor.grad = tensor.w;
    if (tensor.buf == nullptr) tensor.buf = tensor.w;
    const int32_t param_group = step.param_groups[i];
    const bool plain =
        step.phases[i] == Phase::running && is_plain(step.hyperparameters[param_group], step.loss_scale);
    table.set(int(i), param_group, plain, step.phases[i]);
    all_plain &= plain || step.phases[i] == Phase::skipped;
  }
  return all_plain;
}

}  // namespace

int max_param_groups(DType dtype) {
  return dtype == DType::f64 ? StepTable<double, kMostArguments>::kParamGroups
                             : StepTable<float, kMostArguments>::kParamGroups;
}

void limit_device(int64_t shared_bytes, int64_t multiprocessors) {
  shared_limit = shared_bytes;
  multiprocessors_limit = multiprocessors;
}

Device describe_device(int index) {
  int driver = 0, runtime = 0;
  check(cudaDriverGetVersion(&driver), "cudaDriverGetVersion");
  check(cudaRuntimeGetVersion(&runtime), "cudaRuntimeGetVersion");
  if (driver / 1000 < runtime / 1000)
    throw std::runtime_error("cuda executor: expected a driver for CUDA " + std::to_string(runtime / 1000) +
                             ", found one for CUDA " + version(driver) +
                             "; update the driver, or use backend='triton'");
  if (driver < 12010)
    throw std::runtime_error(
        "cuda executor: expected a driver for CUDA 12.1 or newer, whose kernels take 32 KB of "
        "arguments, found one for CUDA " +
        version(driver) + "; update the driver, or use backend='triton'");
  const int64_t reserved = attribute(cudaDevAttrReservedSharedMemoryPerBlock, index);
  const int64_t half = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, index) / 2 - reserved;
  const int64_t most = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, index);
  Device device;
  device.index = index;
  device.multiprocessors =
      std::min<int64_t>(attribute(cudaDevAttrMultiProcessorCount, index), multiprocessors_limit);
  device.shared_bytes = std::min({half, most, shared_limit});
  // Where small groups are to count as large, the limit is z's: what is around it there must be.
  const int64_t around = TileMemory<double>(kLeastSlots).z;
  device.tile_bytes = shared_limit < most - around ? around + shared_limit : most;
  device.l2_bytes = attribute(cudaDevAttrL2CacheSize, index);
  device.cooperative = attribute(cudaDevAttrCooperativeLaunch, index) != 0;
  return device;
}

void prepare(Work& work, DType dtype, const Device& device) {
  check(cudaSetDevice(device.index), "cudaSetDevice");
  with_type(dtype, [&]<typename T>() {
    const auto prepare_kernels = [&]<int bytes>() {
      // This loads a kernel as well, which must not be left to a step that is captured in a graph.
      const auto load = [](auto kernel, int64_t shared) {
        cudaFuncAttributes found{};
        check(cudaFuncGetAttributes(&found, kernel),
              "this build has no kernel for the device; rebuild with its TORCH_CUDA_ARCH_LIST");
        check(allow_shared(kernel, shared), "cudaFuncSetAttribute");
      };
      load(step_rows<T, bytes, true>, kRowsShared<Compute<T>>);
      load(step_rows<T, bytes, false>, kRowsShared<Compute<T>>);
      load(step_chunks<T, bytes>, device.shared_bytes);
      for (const auto kernel : {step_tiles<T, bytes, true>, step_tiles<T, bytes, false>}) {
        load(kernel, device.tile_bytes);
        int resident = 0;
        check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, kTileThreads,
                                                            size_t(work.shared_tiles)),
              "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
        if (resident == 0 && !work.tiles.empty())
          throw std::runtime_error("cuda executor: expected room for a block of " +
                                   std::to_string(kTileThreads) + " threads and " +
                                   std::to_string(work.shared_tiles) +
                                   " bytes of shared memory on a multiprocessor, found none");
        // What waits for each other is cut so that one block a multiprocessor is enough, see cut.cpp.
        work.tile_blocks = int32_t(std::min<int64_t>(resident * device.multiprocessors, work.tiles.size()));
      }
    };
    prepare_kernels.template operator()<kFewArguments>();
    prepare_kernels.template operator()<kMostArguments>();
  });
}

void check_device(int index) {
  Work none;
  prepare(none, DType::f32, describe_device(index));
}

void launch(const Step& step, DType dtype, const Device& device, void* stream, bool& launched) {
  check(cudaSetDevice(device.index), "cudaSetDevice");
  const Work& work = step.work;
  const auto run = [&](auto kernel, auto& table, int64_t blocks, int threads, int64_t shared,
                       bool together = false) {
    if (blocks == 0) return;
    const Launch with(blocks, threads, shared, together, stream);
    check(cudaLaunchKernelEx(&with.config, kernel, table),
          launched ? "a launch after the first failed, so some parameters have been stepped and others not"
                   : "the launch failed, no parameter has changed");
    launched = true;
  };
  const auto run_all = [&]<typename T, int bytes>() {
    static thread_local StepTableOf<T, bytes> table;  // up to 32 KB: not on the stack
    const bool plain = fill(table, step);
    run(plain ? step_rows<T, bytes, true> : step_rows<T, bytes, false>, table, int64_t(work.strips.size()),
        work.strip_threads, kRowsShared<Compute<T>>);
    run(plain ? step_tiles<T, bytes, true> : step_tiles<T, bytes, false>, table, work.tile_blocks,
        kTileThreads, work.shared_tiles, work.tiles_in_parts > 0);
    run(step_chunks<T, bytes>, table, table.tickets, kThreads, work.shared_chunks);
  };
  with_type(dtype, [&]<typename T>() {
    using Few = StepTableOf<T, kFewArguments>;
    if (step.tensors.size() <= Few::kTensors && step.hyperparameters.size() <= Few::kParamGroups)
      run_all.template operator()<T, kFewArguments>();
    else
      run_all.template operator()<T, kMostArguments>();
  });
}

}  // namespace cges::cuda
