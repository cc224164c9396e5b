// record_routing_ on the GPU: expert counts and token scores from indices that the model chose.
#include "common/cuda.cuh"

namespace tk {
namespace {

constexpr int kThreads = 128;
// A block counts in shared memory up to this many experts, beyond it in global memory.
constexpr int kMostBins = 4096;

struct RecordRouting {
  int64_t num_tokens, top_k, num_experts;
  int64_t indices_stride_t, indices_stride_k;  // in elements
  int64_t counts_stride, mask_stride, score_stride;
  unsigned long long* counts;  // [E], added to
  const bool* mask;            // [T] or null: tokens that count
  const float* table;          // [E] contiguous, or null
  float* score;                // [T], added to, or null
  const int32_t* gate;         // nothing is added when it is 0; null: always open
};

struct Bins {
  unsigned counts[kMostBins];
};

// A thread owns a token: its score has one writer and its slots are summed in order. WIDE: rows are contiguous and
// whole 16-byte vectors.
template <typename Index, bool WIDE>
__global__ void __launch_bounds__(kThreads) record_kernel(const Index* indices, RecordRouting p) {
  TK_SHARED(Bins, bins);
  // Nothing waits for the gate before the first indices are on their way: two waits for memory would be most of the
  // time.
  const bool open = p.gate == nullptr || *p.gate != 0;
  const bool use_bins = p.num_experts <= kMostBins;
  if (use_bins) {
    for (int e = threadIdx.x; e < p.num_experts; e += kThreads) bins.counts[e] = 0;
    __syncthreads();
  }
  for (int64_t t = int64_t{blockIdx.x} * kThreads + threadIdx.x; t < p.num_tokens; t += int64_t{gridDim.x} * kThreads) {
    const Index* row = indices + t * p.indices_stride_t;
    const bool counted = p.mask == nullptr || p.mask[t * p.mask_stride];
    float sum = 0.0f;
    const auto take = [&](Index index) {
      // Negative and too large entries (identity experts, sentinels) both fail this one comparison.
      const auto e = static_cast<uint64_t>(static_cast<int64_t>(index));
      if (!open || e >= static_cast<uint64_t>(p.num_experts)) return;
      if (counted) {
        if (use_bins) {
          atomicAdd(&bins.counts[e], 1u);
        } else {
          atomicAdd(&p.counts[e * p.counts_stride], 1ull);
        }
      }
      if (p.table != nullptr) sum += p.table[e];
    };
    if constexpr (WIDE) {
#pragma unroll 2
      for (int64_t j = 0; j < p.top_k; j += kVector<Index>) {
        const Vector<Index> vector = load_vector(row + j);
#pragma unroll
        for (int i = 0; i < kVector<Index>; ++i) take(vector.elements[i]);
      }
    } else {
      for (int64_t j = 0; j < p.top_k; ++j) take(row[j * p.indices_stride_k]);
    }
    if (p.score != nullptr && open) p.score[t * p.score_stride] += sum;
  }
  if (!use_bins || !open) return;
  __syncthreads();
  for (int e = threadIdx.x; e < p.num_experts; e += kThreads) {
    if (bins.counts[e] != 0) atomicAdd(&p.counts[e * p.counts_stride], static_cast<unsigned long long>(bins.counts[e]));
  }
}

template <typename Index>
void record(uintptr_t address, const RecordRouting& p, int num_blocks, uintptr_t stream) {
  const auto* indices = reinterpret_cast<const Index*>(address);
  const bool wide = p.indices_stride_k == 1 && p.indices_stride_t == p.top_k && p.top_k % kVector<Index> == 0 &&
                    address % sizeof(uint4) == 0;
  const dim3 grid = blocks_of(std::min<int64_t>(ceil_div(p.num_tokens, kThreads), num_blocks));
  with_flag(wide, [&](auto flag) { launch(record_kernel<Index, flag.value>, grid, kThreads, stream, indices, p); });
}

[[maybe_unused]] void record_routing_cuda(uintptr_t indices, int index_bytes, bool index_signed, int64_t num_tokens,
                                          int64_t top_k, int64_t indices_stride_t, int64_t indices_stride_k,
                                          uintptr_t counts, int64_t num_experts, int64_t counts_stride, uintptr_t mask,
                                          int64_t mask_stride, uintptr_t table, uintptr_t score, int64_t score_stride,
                                          uintptr_t gate, int num_blocks, uintptr_t stream) {
  if (num_tokens == 0 || top_k == 0) return;
  const RecordRouting p{num_tokens,
                        top_k,
                        num_experts,
                        indices_stride_t,
                        indices_stride_k,
                        counts_stride,
                        mask_stride,
                        score_stride,
                        reinterpret_cast<unsigned long long*>(counts),
                        reinterpret_cast<const bool*>(mask),
                        reinterpret_cast<const float*>(table),
                        reinterpret_cast<float*>(score),
                        reinterpret_cast<const int32_t*>(gate)};
  switch (index_bytes * (index_signed ? 1 : -1)) {
    case 8:
      return record<int64_t>(indices, p, num_blocks, stream);
    case 4:
      return record<int32_t>(indices, p, num_blocks, stream);
    case 2:
      return record<int16_t>(indices, p, num_blocks, stream);
    case 1:
      return record<int8_t>(indices, p, num_blocks, stream);
    case -2:
      return record<uint16_t>(indices, p, num_blocks, stream);
    case -1:
      return record<uint8_t>(indices, p, num_blocks, stream);
    default:
      throw std::invalid_argument("record_routing_cuda: unsupported index type");
  }
}

#ifdef TK_REGISTER
void bind(pybind11::module_& module) { module.def("record_routing_cuda", &record_routing_cuda); }
TK_REGISTER(bind);
#endif

}  // namespace
}  // namespace tk
