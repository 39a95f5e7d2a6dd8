// Decides which tensors share a launch of the CUDA executor, makes their tables in device memory, and calls
// cuda::launch in each step. make_executor (executor.cpp) makes this executor in builds with CUDA.
#include "plan/cuda_executor.h"

#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <algorithm>

namespace cges {
namespace {

// In the tests' emulated build the kernels run on the CPU, on tensors in its memory. These have no stream.
c10::Device device_of(const TensorShape& tensor) {
  return tensor.device < 0 ? c10::Device(c10::kCPU)
                           : c10::Device(c10::kCUDA, c10::DeviceIndex(tensor.device));
}

// torch's interface to CUDA devices. VirtualGuardImpl would use an output stream (see common/text.h), and
// at::accelerator may be another kind of device.
const c10::impl::DeviceGuardImplInterface& cuda_devices() {
  const auto* const devices = c10::impl::device_guard_impl_registry[size_t(c10::DeviceType::CUDA)].load();
  TORCH_CHECK(devices != nullptr, "cuda executor: expected a torch built with CUDA, got one without");
  return *devices;
}

c10::Stream current_stream(c10::Device device) { return cuda_devices().getStream(device); }

// Makes a device the current one as long as the object lives. c10::DeviceGuard does the same, but contains a
// VirtualGuardImpl.
class OnDevice {
 public:
  explicit OnDevice(c10::Device device) {
    if (!device.is_cpu()) before_ = cuda_devices().exchangeDevice(device);
  }
  OnDevice(const OnDevice&) = delete;
  ~OnDevice() {
    if (before_) cuda_devices().uncheckedSetDevice(*before_);
  }

 private:
  std::optional<c10::Device> before_;
};

template <typename Item>
at::Tensor upload(const std::vector<Item>& items, c10::Device device) {
  const int64_t bytes = int64_t(items.size() * sizeof(Item));
  // from_blob does not own the items, so they are copied before this returns.
  return at::from_blob(const_cast<Item*>(items.data()), {bytes}, at::kByte).clone().to(device);
}

// at::empty, called in its form for symbolic sizes: the one for plain sizes uses an output stream
// (common/text.h).
at::Tensor empty(int64_t n, c10::ScalarType dtype, c10::Device device) {
  const c10::SymInt size(n);
  return at::empty_symint(size, at::TensorOptions().device(device).dtype(dtype));
}

}  // namespace

CudaExecutor::CudaExecutor(Rule rule, std::vector<TensorShape> tensors) : rule_(rule) {
  share_out(tensors);
  for (DeviceTables& tables : all_) {
    const OnDevice here(tables.device);
    std::vector<TensorShape> mine;
    for (const size_t i : tables.tensors) mine.push_back(tensors[i]);
    tables.work = cuda::cut(mine, rule_, tables.dtype, tables.description);
    cuda::prepare(tables.work, rule_, tables.dtype, tables.description);
    put_on_device(tables);
  }
}

// Tensors of one device and dtype share tables, in their order. New tables begin wherever the arguments of
// one launch are full. A tensor without elements is in none.
void CudaExecutor::share_out(const std::vector<TensorShape>& tensors) {
  for (size_t i = 0; i < tensors.size(); ++i) {
    const TensorShape& tensor = tensors[i];
    if (tensor.layout.numel() == 0) continue;
    const c10::Device device = device_of(tensor);
    auto tables = std::find_if(all_.rbegin(), all_.rend(), [&](const DeviceTables& x) {
      return x.device == device && x.dtype == tensor.dtype;
    });
    const auto place_in = [&](const DeviceTables& x) {
      return std::find(x.param_groups.begin(), x.param_groups.end(), tensor.param_group) -
             x.param_groups.begin();
    };
    const cuda::Capacity most = cuda::capacity(rule_, tensor.dtype);
    if (tables == all_.rend() || int64_t(tables->tensors.size()) == most.tensors ||
        place_in(*tables) == most.param_groups) {
      const OnDevice here(device);
      const int index = std::max(tensor.device, 0);
      all_.push_back(
          {.device = device, .dtype = tensor.dtype, .description = cuda::describe_device(index, rule_)});
      tables = all_.rbegin();
    }
    const auto place = place_in(*tables);
    if (place == int64_t(tables->param_groups.size())) tables->param_groups.push_back(tensor.param_group);
    tables->tensors.push_back(i);
    tables->places.push_back(int32_t(place));
  }
}

void CudaExecutor::put_on_device(DeviceTables& tables) const {
  const cuda::Work& work = tables.work;
  tables.strips = upload(work.strips, tables.device);
  tables.tiles = upload(work.tiles, tables.device);
  tables.chunks = upload(work.chunks, tables.device);
  tables.scratch = empty(work.scratch_bytes, at::kByte, tables.device);
  tables.counters =
      empty(cuda::kCounters + cuda::kPanelCounters * int64_t{work.panels}, at::kInt, tables.device).zero_();
  const int64_t counted = states_of(rule_).counts ? int64_t(tables.tensors.size()) : 0;
  tables.corrected = empty(counted * cuda::kCorrectedBytes, at::kByte, tables.device);
  tables.held = empty(work.strip_groups, at::kByte, tables.device).zero_();
  tables.lists.resize(tables.tensors.size());
  for (const cuda::Strip& strip : work.strips) {
    if (strip.kind != cuda::Strip::Kind::groups) continue;
    Held& of = tables.lists[strip.tensor];  // its strips lie one after the other
    if (of.groups == 0) of.begin = strip.first_group;
    of.groups += strip.groups;
  }
  if (!tables.device.is_cpu()) tables.stream = current_stream(tables.device).id();
}

// The current stream of the tables' device. If the tables' memory was allocated or last used on another one,
// torch's allocator is told of this stream, so that it does not reuse the memory while kernels there still
// run.
void* CudaExecutor::stream_of(DeviceTables& tables) {
  if (tables.device.is_cpu()) return nullptr;
  const c10::Stream stream = current_stream(tables.device);
  if (stream.id() != tables.stream) {
    for (const at::Tensor* x : {&tables.strips, &tables.tiles, &tables.chunks, &tables.scratch,
                                &tables.counters, &tables.corrected, &tables.held})
      x->record_stream(stream);
    tables.stream = stream.id();
  }
  return stream.native_handle();
}

// Clears the lists of held groups that no longer hold, on the device and so in the order of the steps. A step
// that overflows there leaves the list as it is, so it must hold before the step. Hence kernels trust it, and
// need not be told whether they may.
void CudaExecutor::drop_lists(DeviceTables& tables, const std::vector<TensorInStep>& tensors,
                              const std::vector<Hyperparameters>& hyperparameters) {
  for (size_t i = 0; i < tensors.size(); ++i) {
    Held& held = tables.lists[i];
    if (tensors[i].phase == Phase::skipped) continue;
    const auto use = held.list.before(hyperparameters[tables.places[i]], tensors[i], held.groups > 0);
    if (use == HeldList::Use::begin) tables.held.narrow_symint(0, held.begin, held.groups).zero_();
  }
}

bool CudaExecutor::step(const std::vector<TensorInStep>& tensors,
                        const std::vector<Hyperparameters>& hyperparameters, const ScalerTensors& scaler) {
  bool launched = false;
  for (DeviceTables& tables : all_) {
    std::vector<TensorInStep> mine;
    mine.reserve(tables.tensors.size());
    for (const size_t i : tables.tensors) mine.push_back(tensors.at(i));
    std::vector<Hyperparameters> of_groups;
    for (const int64_t group : tables.param_groups) of_groups.push_back(hyperparameters.at(group));
    const auto* const strips = static_cast<const cuda::Strip*>(tables.strips.const_data_ptr());
    const auto* const chunks = static_cast<const cuda::Item*>(tables.chunks.const_data_ptr());
    const auto* const tiles = static_cast<const cuda::Tile*>(tables.tiles.const_data_ptr());
    const OnDevice here(tables.device);
    const ScalerTensors scale = scaler.on(tables.device);
    void* const stream = stream_of(tables);
    drop_lists(tables, mine, of_groups);
    cuda::launch({tables.work, strips, tiles, chunks, tables.scratch.mutable_data_ptr(),
                  tables.counters.mutable_data_ptr<int32_t>(), tables.corrected.mutable_data_ptr(),
                  tables.held.mutable_data_ptr<uint8_t>(), mine, tables.places, of_groups, scale.addresses()},
                 rule_, tables.dtype, tables.description, stream, launched);
  }
  return true;
}

}  // namespace cges
