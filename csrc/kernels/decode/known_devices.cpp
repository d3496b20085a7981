#include "kernels/decode/known_devices.h"

#include <algorithm>
#include <cctype>

#include "core/error.h"

namespace zigzag::attend {
namespace {

std::string lower(std::string text) {
  std::transform(text.begin(), text.end(), text.begin(), [](unsigned char c) { return std::tolower(c); });
  return text;
}

}  // namespace

const std::vector<KnownDevice>& known_devices() {
  constexpr int kLarge = 227 * 1024, kA100 = 163 * 1024, kSmall = 99 * 1024;
  static const std::vector<KnownDevice> devices = {
      {"A100", {80, 108, kA100, kA100 + 1024, 2039}, {}},
      {"RTX3090", {86, 82, kSmall, kSmall + 1024, 936}, {}},
      {"RTX4090", {89, 128, kSmall, kSmall + 1024, 1008}, {}},
      {"H100", {90, 132, kLarge, kLarge + 1024, 3350}, {18, 18, 18, 18, 18, 16, 16, 10}},
      {"H200", {90, 132, kLarge, kLarge + 1024, 4800}, {18, 18, 18, 18, 18, 16, 16, 10}},
      {"B200", {100, 148, kLarge, kLarge + 1024, 8000}, {20, 20, 20, 18, 18, 18, 18, 16}},
      {"RTX5090", {120, 170, kSmall, kSmall + 1024, 1792}, {16, 16, 16, 16, 16, 16, 16, 16, 14, 14, 14}},
  };
  return devices;
}

const KnownDevice& known_device(const char* name) {
  std::string names;
  for (const KnownDevice& device : known_devices()) {
    if (lower(device.name) == lower(name)) return device;
    names += concat(names.empty() ? "" : ", ", device.name);
  }
  throw Error(concat("GPU '", name, "' is not known; known: ", names));
}

ClusterPlaces cluster_places(const KnownDevice& device) {
  return [device](const DecodePlan& plan) {
    constexpr int kRegisters = 65536, kRegistersOfThread = 256;
    const int largest = device.facts.arch == 120 ? 8 : kMaxCluster;  // of consumer GPUs
    if (device.facts.arch < 90 || plan.cluster > largest) return 0;
    const int by_memory = device.facts.shared_per_sm / (plan.layout.total + 1024);
    const int by_registers = kRegisters / (32 * plan.warps * kRegistersOfThread);
    int places = 0;
    for (const int sms : device.gpcs) places += sms * std::min(by_memory, by_registers) / plan.cluster;
    return places;
  };
}

}  // namespace zigzag::attend
