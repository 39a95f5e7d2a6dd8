#include "plan/cuda_plan.h"

#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <algorithm>
#include <list>

#include "common/text.h"

namespace cges {
namespace {

constexpr size_t kKeptPlans = 8;

cuda::DType to_dtype(c10::ScalarType dtype) {
  switch (dtype) {
    case c10::kFloat:
      return cuda::DType::f32;
    case c10::kDouble:
      return cuda::DType::f64;
    case c10::kBFloat16:
      return cuda::DType::bf16;
    case c10::kHalf:
      return cuda::DType::f16;
    default:
      TORCH_CHECK(false, text("cuda executor: expected float32, float64, bfloat16 or float16, got ",
                              c10::toString(dtype))
                             .c_str());
  }
}

c10::Stream current_stream(c10::Device device) {
  return c10::impl::VirtualGuardImpl(device.type()).getStream(device);
}

template <typename Item>
at::Tensor upload(const std::vector<Item>& items, c10::Device device) {
  const int64_t bytes = int64_t(items.size() * sizeof(Item));
  // from_blob does not own the items: the copy must be done before they go
  return at::from_blob(const_cast<Item*>(items.data()), {bytes}, at::kByte).clone().to(device);
}

}  // namespace

// The tensors of a device and dtype in their order, a new batch wherever one launch's arguments are full.
std::vector<CudaPlan::Batch> CudaPlan::batches_of(const std::vector<StepTensor>& tensors) {
  std::vector<Batch> batches;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const StepTensor& tensor = tensors[i];
    if (tensor.layout.numel() == 0) continue;
    const cuda::DType dtype = to_dtype(tensor.dtype);
    auto batch = std::find_if(batches.rbegin(), batches.rend(),
                              [&](const Batch& b) { return b.device == tensor.device && b.dtype == dtype; });
    const auto row_in = [&](const Batch& b) {
      return std::find(b.groups.begin(), b.groups.end(), tensor.group) - b.groups.begin();
    };
    if (batch == batches.rend() || batch->tensors.size() == cuda::kMaxTensors ||
        row_in(*batch) == cuda::max_rows(dtype)) {
      const int index = tensor.device.has_index() ? tensor.device.index() : 0;
      batches.push_back(
          {tensor.device, dtype, cuda::describe_device(index), {}, {}, {}, {}, {}, {}, {}, {}, 0});
      batch = batches.rbegin();
    }
    const auto row = row_in(*batch);
    if (row == int64_t(batch->groups.size())) batch->groups.push_back(tensor.group);
    batch->tensors.push_back(i);
    batch->rows.push_back(int32_t(row));
  }
  return batches;
}

void CudaPlan::put_on_device(Batch& batch) {
  const cuda::Work& work = batch.work;
  std::vector<cuda::Item> items;
  for (const auto* part : {&work.blocks, &work.clusters, &work.chunks})
    items.insert(items.end(), part->begin(), part->end());
  const auto on_device = at::TensorOptions().device(batch.device);
  batch.strips = upload(work.strips, batch.device);
  batch.items = upload(items, batch.device);
  batch.scratch = at::empty({work.scratch_bytes}, on_device.dtype(at::kByte));
  batch.counters =
      at::zeros({cuda::kCounters + cuda::kPanelCounters * int64_t{work.panels}}, on_device.dtype(at::kInt));
  batch.stream = current_stream(batch.device).id();
}

CudaPlan::CudaPlan(const std::vector<StepTensor>& tensors) : batches_(batches_of(tensors)) {
  for (Batch& batch : batches_) {
    const c10::DeviceGuard guard(batch.device);
    std::vector<cuda::TensorShape> shapes;
    for (const size_t i : batch.tensors) shapes.push_back({tensors[i].layout, tensors[i].has_groups});
    batch.work = cuda::cut(shapes, batch.dtype, batch.description);
    cuda::check_launchable(batch.work, batch.dtype, batch.description);
    put_on_device(batch);
  }
}

// The current stream; memory that was allocated on another one must outlive what is launched on this.
void* CudaPlan::stream_of(Batch& batch) {
  if (batch.device.is_cpu()) return nullptr;  // emulated
  const c10::Stream stream = current_stream(batch.device);
  if (stream.id() != batch.stream) {
    for (const at::Tensor* x : {&batch.strips, &batch.items, &batch.scratch, &batch.counters})
      x->record_stream(stream);
    batch.stream = stream.id();
  }
  return stream.native_handle();
}

void CudaPlan::step(const std::vector<StepRow>& table, const std::vector<Hyperparameters>& hyperparameters,
                    const ScalerTensors& scaler) {
  bool launched = false;
  for (Batch& batch : batches_) {
    std::vector<cuda::TensorArgs> args;
    std::vector<int64_t> phases;
    args.reserve(batch.tensors.size());
    phases.reserve(batch.tensors.size());
    for (const size_t i : batch.tensors) {
      const StepRow& row = table[i];
      args.push_back({reinterpret_cast<void*>(row.w), reinterpret_cast<const void*>(row.grad),
                      reinterpret_cast<void*>(row.buf)});
      phases.push_back(row.phase);
    }
    std::vector<Hyperparameters> rows;
    for (const int64_t group : batch.groups) rows.push_back(hyperparameters.at(group));
    const auto* const strips = static_cast<const cuda::Strip*>(batch.strips.const_data_ptr());
    const auto* const items = static_cast<const cuda::Item*>(batch.items.const_data_ptr());
    const cuda::Item* const clusters = items + batch.work.blocks.size();
    const c10::DeviceGuard guard(batch.device);
    const ScalerTensors here = scaler.on(batch.device);
    cuda::launch({batch.work, strips, items, clusters, clusters + batch.work.clusters.size(),
                  batch.scratch.mutable_data_ptr(), batch.counters.mutable_data_ptr<int32_t>(), args, phases,
                  batch.rows, rows, here.addresses()},
                 batch.dtype, batch.description, stream_of(batch), launched);
  }
}

namespace {

struct Kept {
  std::vector<StepTensor> tensors;
  std::vector<c10::StreamId> streams;  // two steps of one plan at once would share its scratch
  bool pinned;                         // a graph that was captured may come back to its tables
  CudaPlan plan;
};

// Never destroyed: at exit the driver may be gone before it.
std::list<Kept>& kept_plans() {
  static auto& kept = *new std::list<Kept>;
  return kept;
}

}  // namespace

CudaPlan& kept_cuda_plan(const std::vector<StepTensor>& tensors, bool pin) {
  std::list<Kept>& kept = kept_plans();
  std::vector<c10::StreamId> streams;
  for (const StepTensor& x : tensors) streams.push_back(current_stream(x.device).id());
  const auto found = std::find_if(
      kept.begin(), kept.end(), [&](const Kept& k) { return k.tensors == tensors && k.streams == streams; });
  if (found != kept.end())
    kept.splice(kept.begin(), kept, found);
  else
    kept.push_front({tensors, streams, false, CudaPlan(tensors)});
  kept.front().pinned |= pin;
  const auto last = std::find_if(kept.rbegin(), kept.rend(), [](const Kept& k) { return !k.pinned; });
  if (kept.size() > kKeptPlans && last != kept.rend()) kept.erase(std::next(last).base());
  return kept.front().plan;
}

void forget_kept_cuda_plans() { kept_plans().clear(); }

}  // namespace cges
