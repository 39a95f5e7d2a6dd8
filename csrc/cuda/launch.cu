// The host side of the CUDA executor's kernels: the limits of a device, the arguments of a step, and its
// launches. A step of a model's parameters is up to three kernels for each dtype, and a small one before them
// if the device has to count steps; docs/design/cuda-executor.md says which, and why.
// plan/cuda_executor.cpp calls it.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "cuda/kernels.cuh"

namespace cges::cuda {
namespace {

int64_t shared_limit = INT64_MAX, multiprocessors_limit = INT64_MAX;  // see limit_device

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // forgets the error, which torch would take for that of its own next launch
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

// The configuration of one launch.
struct Launch {
  Launch(const Launch&) = delete;  // `config` points at `cooperative`
  cudaLaunchConfig_t config{};
  cudaLaunchAttribute cooperative{};

  // `together` makes the launch cooperative: it fails unless all blocks can run at once.
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

template <typename F>
void with_rule(Rule rule, F f) {
  rule == Rule::sgd ? f.template operator()<Sgd>() : f.template operator()<Adamw>();
}

// If some of the numbers lie on the device, the thresholds hold bare coefficients; see ParamGroup.
template <typename A, typename UpdateRule>
ParamGroup<A, UpdateRule> to_param_group(const Hyperparameters& h) {
  const Coefficients<double>& bare = h.coefficients;
  const Thresholds<double> thresholds =
      h.device.any() ? Thresholds<double>{bare.group_lasso, bare.exclusive_lasso, bare.l1} : h.thresholds();
  return {typename UpdateRule::template Group<A>(h), thresholds.as<A>(), h.exact,
          h.skip_dead && h.freeze == Freeze::group,  h.freeze,           h.device};
}

// Whether a step whose phase is running is plain: the kind that nearly all users run, and that has a path of
// its own. It uses no rare option, and the host knows every number.
bool is_plain(const Hyperparameters& h, const LossScale& loss_scale) {
  return !h.nesterov && h.freeze == Freeze::none && !h.searches() && !h.device.any() &&
         loss_scale.grad_scale == nullptr;
}

// Whether only the device knows some of a tensor's own numbers, so that correct_steps must run.
bool needs_correction(const Hyperparameters& h, const TensorInStep& tensor) {
  return tensor.count_on_device != nullptr || (tensor.count > 0 && h.device.lr != nullptr);
}

// Fills in the arguments of the kernels. Returns whether the steps of all tensors are plain.
template <typename A, typename UpdateRule, bool few>
bool fill(StepTable<A, UpdateRule, few>& table, const Step& step) {
  using Table = StepTable<A, UpdateRule, few>;
  static_assert(sizeof(table) <= Table::kBytes && Table::kParamGroups > 0);
  static_assert(sizeof(table) + sizeof(int) + sizeof(float) <= kMostArguments);  // those of correct_steps
  bool all_plain = !step.work.ones;
  table.corrected = nullptr;
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
  table.held = step.held;
  table.loss_scale = step.loss_scale;
  table.stages = 1;
  for (size_t i = 0; i < step.hyperparameters.size(); ++i) {
    const Hyperparameters& h = step.hyperparameters[i];
    table.param_groups[i] = to_param_group<A, UpdateRule>(h);
    if (h.searches()) table.stages = ShrinkageSolver<A>::kMaxSweeps;
  }
  table.tickets = int32_t(step.work.chunks.size() * (table.stages + 1));
  for (size_t i = 0; i < step.tensors.size(); ++i) {
    const TensorInStep& tensor = step.tensors[i];
    auto& to = table.tensors[i];
    to.w = tensor.w;
    to.grad = tensor.grad != nullptr ? tensor.grad : tensor.w;
    for (int s = 0; s < UpdateRule::kStates; ++s)
      to.states[s] = tensor.states[s] != nullptr ? tensor.states[s] : tensor.w;
    const int32_t param_group = step.param_groups[i];
    const Hyperparameters& h = step.hyperparameters[param_group];
    const bool plain = tensor.phase == Phase::running && is_plain(h, step.loss_scale);
    table.set(int(i), param_group, tensor.count_on_device != nullptr, plain, tensor.phase);
    if constexpr (!Table::Own::kNone) {
      table.owns[i] = typename Table::Own(h, tensor);
      if (needs_correction(h, tensor)) table.corrected = step.corrected;
    }
    all_plain &= plain || tensor.phase == Phase::skipped;
  }
  return all_plain;
}

}  // namespace

Capacity capacity(Rule rule, DType dtype) {
  Capacity found{};
  with_rule(rule, [&]<typename UpdateRule>() {
    found = {UpdateRule::kMostTensors, dtype == DType::f64
                                           ? StepTable<double, UpdateRule, false>::kParamGroups
                                           : StepTable<float, UpdateRule, false>::kParamGroups};
  });
  return found;
}

void limit_device(int64_t shared_bytes, int64_t multiprocessors) {
  shared_limit = shared_bytes;
  multiprocessors_limit = multiprocessors;
}

Device describe_device(int index, Rule rule) {
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
  // A limit from limit_device is a limit on z: the other arrays in shared memory are needed in any case.
  const int64_t around = TileMemory<double>(kLeastSlots, states_of(rule).n).z;
  device.tile_bytes = shared_limit < most - around ? around + shared_limit : most;
  device.l2_bytes = attribute(cudaDevAttrL2CacheSize, index);
  device.cooperative = attribute(cudaDevAttrCooperativeLaunch, index) != 0;
  return device;
}

void prepare(Work& work, Rule rule, DType dtype, const Device& device) {
  check(cudaSetDevice(device.index), "cudaSetDevice");
  const auto prepare_kernels = [&]<typename T, typename UpdateRule, bool few>() {
    // Asking for a kernel's attributes also loads it, which must not happen first in a step that a graph
    // captures.
    const auto load = [](auto kernel, int64_t shared) {
      cudaFuncAttributes found{};
      check(cudaFuncGetAttributes(&found, kernel),
            "this build has no kernel for the device; rebuild with its TORCH_CUDA_ARCH_LIST");
      check(allow_shared(kernel, shared), "cudaFuncSetAttribute");
    };
    load(step_rows<T, UpdateRule, few, true>, kRowsShared<Compute<T>>);
    load(step_rows<T, UpdateRule, few, false>, kRowsShared<Compute<T>>);
    load(step_chunks<T, UpdateRule, few>, device.shared_bytes);
    if constexpr (!StepTableOf<T, UpdateRule, few>::Own::kNone) load(correct_steps<T, UpdateRule, few>, 0);
    for (const auto kernel : {step_tiles<T, UpdateRule, few, true>, step_tiles<T, UpdateRule, few, false>}) {
      load(kernel, device.tile_bytes);
      int resident = 0;
      check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, kTileThreads,
                                                          size_t(work.shared_tiles)),
            "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
      if (resident == 0 && !work.tiles.empty())
        throw std::runtime_error(
            "cuda executor: expected room for a block of " + std::to_string(kTileThreads) + " threads and " +
            std::to_string(work.shared_tiles) + " bytes of shared memory on a multiprocessor, found none");
      // Parts that wait for each other are cut so that one block on each multiprocessor is enough (cut.cpp).
      work.tile_blocks = int32_t(std::min<int64_t>(resident * device.multiprocessors, work.tiles.size()));
    }
  };
  with_rule(rule, [&]<typename UpdateRule>() {
    with_type(dtype, [&]<typename T>() {
      prepare_kernels.template operator()<T, UpdateRule, true>();
      prepare_kernels.template operator()<T, UpdateRule, false>();
    });
  });
}

void check_device(int index) {
  Work none;
  prepare(none, Rule::sgd, DType::f32, describe_device(index, Rule::sgd));
}

void launch(const Step& step, Rule rule, DType dtype, const Device& device, void* stream, bool& launched) {
  check(cudaSetDevice(device.index), "cudaSetDevice");
  const Work& work = step.work;
  const auto check_launch = [&](cudaError_t error) {
    check(error, launched ? "a launch failed, so some parameters have been stepped and others not"
                          : "the launch failed, no parameter has changed");
  };
  const auto run_all = [&]<typename T, typename UpdateRule, bool few>() {
    static thread_local StepTableOf<T, UpdateRule, few> table;  // up to 32 KB, too much for the stack
    const bool plain = fill(table, step);
    const auto count = [&](float by) {
      if constexpr (!StepTableOf<T, UpdateRule, few>::Own::kNone)
        if (table.corrected != nullptr) {
          int tensors = int(step.tensors.size());
          const Launch with((tensors + kWarp - 1) / kWarp, kWarp, 0, false, stream);
          return cudaLaunchKernelEx(&with.config, correct_steps<T, UpdateRule, few>, table, tensors, by);
        }
      return cudaSuccess;
    };
    bool stepped = false;
    const auto run = [&](auto kernel, int64_t blocks, int threads, int64_t shared, bool together) {
      if (blocks == 0) return;
      const Launch with(blocks, threads, shared, together, stream);
      const cudaError_t error = cudaLaunchKernelEx(&with.config, kernel, table);
      // No weight has moved, so no count may have. If this fails too, the device is lost.
      if (error != cudaSuccess && !stepped) count(-1);
      check_launch(error);
      launched = stepped = true;
    };
    check_launch(count(1));
    run(plain ? step_rows<T, UpdateRule, few, true> : step_rows<T, UpdateRule, few, false>,
        int64_t(work.strips.size()), work.strip_threads, kRowsShared<Compute<T>>, false);
    run(plain ? step_tiles<T, UpdateRule, few, true> : step_tiles<T, UpdateRule, few, false>,
        work.tile_blocks, kTileThreads, work.shared_tiles, work.tiles_in_parts > 0);
    run(step_chunks<T, UpdateRule, few>, table.tickets, kThreads, work.shared_chunks, false);
  };
  with_rule(rule, [&]<typename UpdateRule>() {
    with_type(dtype, [&]<typename T>() {
      using Few = StepTableOf<T, UpdateRule, true>;
      if (step.tensors.size() <= Few::kTensors && step.hyperparameters.size() <= Few::kParamGroups)
        run_all.template operator()<T, UpdateRule, true>();
      else
        run_all.template operator()<T, UpdateRule, false>();
    });
  });
}

}  // namespace cges::cuda
