// Plan files, as zigzag_ext.Plan.save writes them: the way from a plan that was solved in Python to an engine without
// it.
#pragma once

#include <string>
#include <string_view>

#include "core/types.h"
#include "engine/layer_plan.h"

namespace zigzag {

struct PlanFile {
  LayerPlan plan;
  KvFormats retrieval, streaming;  // of full caches, of rings
  bool key_smoothing;              // keys are cached less an offset per head: the caller's to subtract
};

// Throws zigzag::Error where there is no such file, where it is not a plan file or one of a newer version, and where it
// holds no valid plan; the message names the path and says which.
PlanFile read_plan_file(const std::string& path);

// The same of a file's contents.
PlanFile parse_plan(std::string_view text);

}  // namespace zigzag
