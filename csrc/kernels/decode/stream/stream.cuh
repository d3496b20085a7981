// Decode over a sink + window ring in one launch, append included. The blocks of a cluster share one (batch, KV head)
// and merge through distributed shared memory; without clusters one block takes it all.
//
// A chunk of several tokens overwrites slots that its own first queries still attend. So one cluster reads everything
// of its (batch, KV head), row block after row block, and appends after the barrier of the last merge.
#pragma once

#include "core/dispatch.h"
#include "kernels/decode/launch_plan.cuh"
#include "kernels/decode/segments.cuh"

namespace zigzag::decode_stream {

using namespace attend;

// Anything but one new token over a list of all slots: see SingleJob.
template <class S>
struct Job {
  const Params& p;
  int rank;

  __device__ __forceinline__ Segment start() const {
    Segment segment;
    segment.keys = locate_keys<S>(p, blockIdx.z, blockIdx.y);
    settle_keys<S>(p, segment.keys);
    segment.row_block = 0;
    const int items = count_items<S>(p, segment.keys);
    segment.begin = (items * rank) >> p.cluster_log2;
    segment.end = (items * (rank + 1)) >> p.cluster_log2;
    return segment;
  }

  __device__ __forceinline__ bool next(Segment& segment) const { return ++segment.row_block < p.row_blocks; }

  __device__ __forceinline__ void finish(const Segment& segment, State<S>& state, bool more) const {
    if (in_cluster<S>(p)) {
      finish_in_cluster<S>(p, segment, state, more);
    } else {
      finish_in_block<S>(p, segment, state);
    }
    if (more || in_place<S>(p)) return;
    NewTokens<S> tokens;
    const int threads = S::kCodes ? blockDim.x / 32 : blockDim.x, thread = S::kCodes ? threadIdx.x / 32 : threadIdx.x;
    tokens.load(p, segment.keys, 0, segment.keys.fresh, rank * threads + thread);
    tokens.append(p, segment.keys, p.team * threads);
  }
};

// One new token over a list of all slots.
template <class S>
__device__ __forceinline__ void run_one_token(const Params& p) {
  run_single<S>(p, [&](const Segment& segment, State<S>& state) {
    if (in_cluster<S>(p)) {
      finish_in_cluster<S>(p, segment, state, false);
    } else {
      finish_in_block<S>(p, segment, state);
    }
  });
}

template <class S>
__global__ void __launch_bounds__(kMaxWarps * 32, 1) decode_stream_kernel(const __grid_constant__ Params p) {
  if constexpr (S::kSingle) {
    run_one_token<S>(p);
  } else {
    if (in_cluster<S>(p)) cuda::cluster_arrive_relaxed();
    Job<S> job = {p, in_cluster<S>(p) ? cuda::cluster_rank() : 0};
    run_segments<S>(p, job.start(), job);
  }
}

// For one new token: see bare_params.
template <class S>
__global__ void __launch_bounds__(kMaxWarps * 32, 1) decode_stream_bare_kernel(const __grid_constant__ Params p) {
  run_one_token<S>(bare_params<S>(p));
}

template <class Element, int kHeadDim, int kRowTiles>
void launch_shape(const AttentionParams& a, void* stream) {
  using S = Shape<Element, kHeadDim, kRowTiles, true, false>;
  using Single = Shape<Element, kHeadDim, kRowTiles, true, true>;
  launch_planned<S>(a, decode_stream_kernel<S>, decode_stream_kernel<Single>, stream,
                    decode_stream_bare_kernel<Single>);
}

template <class Element>
void launch_decode_stream(const AttentionParams& a, void* stream) {
  check_strides(a);
  dispatch_head_dim(a.head_dim, [&](auto head_dim) {
    dispatch_bool(a.num_q_heads / a.num_kv_heads * a.q_len > 8, [&](auto many_rows) {
      launch_shape<Element, head_dim.value, row_tiles(head_dim.value, many_rows.value ? 16 : 8)>(a, stream);
    });
  });
}

}  // namespace zigzag::decode_stream
