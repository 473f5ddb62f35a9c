#include "counters.h"

#include <mutex>

namespace simulated_npu {
namespace {

std::mutex g_mutex;
Counts g_ops;
Counts g_host_syncs;
int64_t g_copied_bytes = 0;
thread_local bool t_counting = true;

void count(Counts& counts, const std::string& name) {
  if (!t_counting) return;
  const std::lock_guard<std::mutex> lock(g_mutex);
  counts[name]++;
}

Counts copy_of(const Counts& counts) {
  const std::lock_guard<std::mutex> lock(g_mutex);
  return counts;
}

}  // namespace

void count_op(const std::string& name) {
  count(g_ops, name);
}

Counts op_counts() {
  return copy_of(g_ops);
}

void count_host_sync(const std::string& kind) {
  count(g_host_syncs, kind);
}

Counts host_sync_counts() {
  return copy_of(g_host_syncs);
}

void count_copied_bytes(int64_t bytes) {
  if (!t_counting) return;
  const std::lock_guard<std::mutex> lock(g_mutex);
  g_copied_bytes += bytes;
}

int64_t copied_bytes() {
  const std::lock_guard<std::mutex> lock(g_mutex);
  return g_copied_bytes;
}

void reset_counts() {
  const std::lock_guard<std::mutex> lock(g_mutex);
  g_ops.clear();
  g_host_syncs.clear();
}

bool set_counting(bool enabled) {
  const bool before = t_counting;
  t_counting = enabled;
  return before;
}

bool is_counting() {
  return t_counting;
}

}  // namespace simulated_npu
