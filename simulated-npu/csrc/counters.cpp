#include "counters.h"

#include <mutex>

namespace simulated_npu {
namespace {

std::mutex g_mutex;
Counts g_ops;
Counts g_host_syncs;
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
