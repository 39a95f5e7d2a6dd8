#include "plan/cuda_executor.h"

#include <ATen/DeviceAccelerator.h>

#include <algorithm>

namespace cges {
namespace {

// Tensors whose kernels run on the CPU, as the tests build them, have no stream.
c10::Device device_of(const TensorShape& tensor) {
  return tensor.device < 0 ? c10::Device(c10::kCPU)
                           : c10::Device(c10::kCUDA, c10::DeviceIndex(tensor.device));
}

template <typename Item>
at::Tensor upload(const std::vector<Item>& items, c10::Device device) {
  const int64_t bytes = int64_t(items.size() * sizeof(Item));
  // from_blob does not own the items: the copy must be done before they go
  return at::from_blob(const_cast<Item*>(items.data()), {bytes}, at::kByte).clone().to(device);
}

// By torch's function of symbolic sizes: that of plain ones brings an output stream, see common/text.h.
at::Tensor empty(int64_t n, c10::ScalarType dtype, c10::Device device) {
  const c10::SymInt size(n);
  return at::empty_symint(size, at::TensorOptions().device(device).dtype(dtype));
}

}  // namespace

CudaExecutor::CudaExecutor(std::vector<TensorShape> tensors) {
  share_out(tensors);
  for (DeviceTables& tables : all_) {
    std::vector<TensorShape> mine;
    for (const size_t i : tables.tensors) mine.push_back(tensors[i]);
    tables.work = cuda::cut(mine, tables.dtype, tables.description);
    cuda::check_launchable(tables.work, tables.dtype, tables.description);
    put_on_device(tables);
  }
}

// The tensors of a device and dtype in their order, with new tables wherever one launch's arguments are full.
void CudaExecutor::share_out(const std::vector<TensorShape>& tensors) {
  for (size_t i = 0; i < tensors.size(); ++i) {
    const TensorShape& tensor = tensors[i];
    if (tensor.layout.numel() == 0) continue;
    const c10::Device device = device_of(tensor);
    auto tables = std::find_if(all_.rbegin(), all_.rend(), [&](const DeviceTables& x) {
      return x.device == device && x.dtype == tensor.dtype;
    });
    const auto place_in = [&](const DeviceTables& x) {
      return std::find(x.groups.begin(), x.groups.end(), tensor.param_group) - x.groups.begin();
    };
    if (tables == all_.rend() || tables->tensors.size() == cuda::kMaxTensors ||
        place_in(*tables) == cuda::max_param_groups(tensor.dtype)) {
      const int index = std::max(tensor.device, 0);
      all_.push_back({device, tensor.dtype, cuda::describe_device(index), {}, {}, {}, {}, {}, {}, {}, {}, 0});
      tables = all_.rbegin();
    }
    const auto place = place_in(*tables);
    if (place == int64_t(tables->groups.size())) tables->groups.push_back(tensor.param_group);
    tables->tensors.push_back(i);
    tables->param_groups.push_back(int32_t(place));
  }
}

void CudaExecutor::put_on_device(DeviceTables& tables) {
  const cuda::Work& work = tables.work;
  std::vector<cuda::Item> items;
  for (const auto* part : {&work.blocks, &work.clusters, &work.chunks})
    items.insert(items.end(), part->begin(), part->end());
  tables.strips = upload(work.strips, tables.device);
  tables.items = upload(items, tables.device);
  tables.scratch = empty(work.scratch_bytes, at::kByte, tables.device);
  tables.counters =
      empty(cuda::kCounters + cuda::kPanelCounters * int64_t{work.panels}, at::kInt, tables.device).zero_();
  if (!tables.device.is_cpu()) tables.stream = at::accelerator::getCurrentStream(tables.device.index()).id();
}

// The current stream; memory that was allocated on another one must outlive what is launched on this.
void* CudaExecutor::stream_of(DeviceTables& tables) {
  if (tables.device.is_cpu()) return nullptr;
  const c10::Stream stream = at::accelerator::getCurrentStream(tables.device.index());
  if (stream.id() != tables.stream) {
    for (const at::Tensor* x : {&tables.strips, &tables.items, &tables.scratch, &tables.counters})
      x->record_stream(stream);
    tables.stream = stream.id();
  }
  return stream.native_handle();
}

bool CudaExecutor::step(const std::vector<TensorAddresses>& addresses, const std::vector<Phase>& phases,
                        const std::vector<Hyperparameters>& hyperparameters, const ScalerTensors& scaler) {
  bool launched = false;
  for (DeviceTables& tables : all_) {
    std::vector<TensorAddresses> mine;
    std::vector<Phase> my_phases;
    mine.reserve(tables.tensors.size());
    my_phases.reserve(tables.tensors.size());
    for (const size_t i : tables.tensors) {
      mine.push_back(addresses.at(i));
      my_phases.push_back(phases.at(i));
    }
    std::vector<Hyperparameters> of_groups;
    for (const int64_t group : tables.groups) of_groups.push_back(hyperparameters.at(group));
    const auto* const strips = static_cast<const cuda::Strip*>(tables.strips.const_data_ptr());
    const auto* const items = static_cast<const cuda::Item*>(tables.items.const_data_ptr());
    const cuda::Item* const clusters = items + tables.work.blocks.size();
    const ScalerTensors here = scaler.on(tables.device);
    cuda::launch({tables.work, strips, items, clusters, clusters + tables.work.clusters.size(),
                  tables.scratch.mutable_data_ptr(), tables.counters.mutable_data_ptr<int32_t>(), mine,
                  my_phases, tables.param_groups, of_groups, here.addresses()},
                 tables.dtype, tables.description, stream_of(tables), launched);
  }
  return true;
}

}  // namespace cges
