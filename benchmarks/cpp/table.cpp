#include "table.h"

#include <cinttypes>
#include <utility>

#include "core/error.h"

namespace zigzag::bench {
namespace {

constexpr const char* kColumns =
    "commit,gpu,driver,torch,op,impl,scenario,kv_format,batch,num_q_heads,num_kv_heads,head_dim,q_len,kv_len,sink,"
    "window,"
    "p20_us,p50_us,p80_us,bytes,gbps,pct_copy";

// No field may break a CSV line; device names are the only foreign text.
std::string plain(std::string text) {
  for (char& c : text) {
    if (c == ',' || c == '"' || c == '\n') c = ' ';
  }
  return text;
}

}  // namespace

Table::Table(const Device& device, std::string commit, const std::string& csv)
    : gpu_(plain(device.name())),
      driver_(plain(device.driver())),
      commit_(plain(std::move(commit))),
      file_(nullptr, std::fclose) {
  if (!csv.empty()) {
    file_.reset(std::fopen(csv.c_str(), "w"));
    ZZ_CHECK(file_ != nullptr, "cannot write the CSV file '", csv, "'");
    std::fprintf(file_.get(), "%s\n", kColumns);
  }
  std::printf("%-14s %-11s %-24s %-5s %6s %6s %4s %3s %8s %10s %10s %10s %8s %7s %7s %9s\n", "op", "impl", "scenario",
              "kv", "batch", "heads", "dim", "q", "kv_len", "p20 us", "p50 us", "p80 us", "GB/s", "% copy", "% read",
              "error");
}

void Table::add(const Row& r) {
  const double gbps = static_cast<double>(r.bytes) * 1e-3 / r.time.p50;
  const double pct_copy = 100 * gbps / r.copy_gbps;
  const std::string heads = std::to_string(r.num_q_heads) + "/" + std::to_string(r.num_kv_heads);
  std::printf("%-14s %-11s %-24s %-5s %6d %6s %4d %3d %8d %10.2f %10.2f %10.2f %8.1f %7.1f %7.1f %9.1e\n", r.op.c_str(),
              r.impl.c_str(), r.scenario.c_str(), r.kv_format.c_str(), r.batch, heads.c_str(), r.head_dim, r.q_len,
              r.kv_len, r.time.p20, r.time.p50, r.time.p80, gbps, pct_copy, r.percent_read, r.error);
  std::fflush(stdout);
  if (!file_) return;
  std::fprintf(file_.get(), "%s,%s,%s,-,%s,%s,%s,%s,%d,%d,%d,%d,%d,%d,%d,%d,%.3f,%.3f,%.3f,%" PRId64 ",%.1f,%.1f\n",
               commit_.c_str(), gpu_.c_str(), driver_.c_str(), r.op.c_str(), r.impl.c_str(), plain(r.scenario).c_str(),
               r.kv_format.c_str(), r.batch, r.num_q_heads, r.num_kv_heads, r.head_dim, r.q_len, r.kv_len, r.sink,
               r.window, r.time.p20, r.time.p50, r.time.p80, r.bytes, gbps, pct_copy);
  std::fflush(file_.get());
}

}  // namespace zigzag::bench
