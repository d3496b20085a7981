// Facts of some GPUs by their data sheets, so that plans can be shown and tested where there is none.
#pragma once

#include <string>
#include <vector>

#include "kernels/decode/plan.h"

namespace zigzag::attend {

struct KnownDevice {
  const char* name;
  cuda::DeviceFacts facts;
  // SMs of each GPC: a cluster lies within one. They differ between GPUs of one kind; those of the H100 are such that 7
  // clusters of 16, 15 of 8 and 30 of 4 with one block per SM run at once, as on the ones that were measured; those of
  // the others are guesses.
  std::vector<int> gpcs;
};

const std::vector<KnownDevice>& known_devices();

// By name, in any case; throws on any other name.
const KnownDevice& known_device(const char* name);

// Of kernels of up to 255 registers.
ClusterPlaces cluster_places(const KnownDevice& device);

}  // namespace zigzag::attend
