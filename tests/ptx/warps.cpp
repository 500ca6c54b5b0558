// Instructions of several lanes or warps: shuffles, barriers, fences.
#include <algorithm>

#include "operations.h"

namespace ptx {
namespace {

// Whether the lanes that an instruction names are all here.
bool together(const Warp& w, uint32_t named, uint32_t lanes) { return (named & w.live() & ~lanes) == 0; }

enum class Shuffle { index, butterfly };

template <Shuffle kind>
Flow shuffle(Warp& w, const Instruction& i, uint32_t lanes) {
  if (!together(w, uint32_t(w.slot(i, 4)[std::countr_zero(lanes)]), lanes)) return Flow::apart;
  uint64_t *to = w.slot(i, 0), *a = w.slot(i, 1), *b = w.slot(i, 2), *c = w.slot(i, 3);
  uint64_t before[kLanes];
  std::copy_n(a, kLanes, before);
  for_each_lane(lanes, [&](int lane) {
    const uint32_t segments = c[lane] >> 8 & 31, clamp = c[lane] & 31, by = b[lane] & 31;
    const uint32_t most = (lane & segments) | (clamp & ~segments);
    uint32_t from = kind == Shuffle::index ? (lane & segments) | (by & ~segments) : lane ^ by;
    const bool inside = from <= most;
    if (!inside) from = lane;
    if (!(lanes >> from & 1)) fail("a shuffle from a lane that takes no part");
    to[lane] = uint32_t(before[from]);
    if (i.count(0) > 1) w.slot(i, 0, 1)[lane] = inside;
  });
  return Flow::next;
}

template <class T, class Join>
Flow reduce(Warp& w, const Instruction& i, uint32_t lanes, T all, const Join& join) {
  if (!together(w, uint32_t(w.slot(i, 2)[std::countr_zero(lanes)]), lanes)) return Flow::apart;
  uint64_t *to = w.slot(i, 0), *a = w.slot(i, 1);
  for_each_lane(lanes, [&](int lane) { all = join(all, get<T>(a[lane])); });
  for_each_lane(lanes, [&](int lane) { set(to[lane], all); });
  return Flow::next;
}

template <class T>
Flow reduce_max(Warp& w, const Instruction& i, uint32_t lanes) {
  return reduce(w, i, lanes, std::numeric_limits<T>::lowest(), [](T a, T b) { return std::max(a, b); });
}

Flow reduce_sum(Warp& w, const Instruction& i, uint32_t lanes) {
  return reduce(w, i, lanes, uint32_t{0}, [](uint32_t a, uint32_t b) { return a + b; });
}

Flow warp_barrier(Warp& w, const Instruction& i, uint32_t lanes) {
  if (!together(w, uint32_t(w.slot(i, 0)[std::countr_zero(lanes)]), lanes)) return Flow::apart;
  ++w.meeting;
  return Flow::next;
}

Flow block_barrier(Warp& w, const Instruction& i, uint32_t lanes) {
  Barrier& barrier = w.block.barriers[*w.slot(i, 0)];
  const int all = i.operands.size() > 1 ? int(*w.slot(i, 1)) : w.block.live_threads();
  for (Warp::Group& one : w.groups)
    if (one.lanes & lanes) one.barrier = &barrier, one.round = barrier.round;
  barrier.arrived += std::popcount(lanes);
  barrier.known.join(w.known);
  if (barrier.arrived >= all) {
    barrier.arrived = 0;
    barrier.over = barrier.known;
    ++barrier.round;
  }
  return Flow::wait;
}

PhaseBarrier& phase_barrier(Warp& w, const Instruction& i, int operand, int lane) {
  const int64_t at = int64_t(w.slot(i, operand)[lane]) + i.operands[operand].offset;
  w.block.shared(uint32_t(at), 8, 8);
  return w.block.phase_barriers[at];
}

Flow initialize(Warp& w, const Instruction& i, uint32_t lanes) {
  for_each_lane(lanes, [&](int lane) {
    PhaseBarrier& barrier = phase_barrier(w, i, 0, lane);
    barrier.count = barrier.pending = int(w.slot(i, 1)[lane]);
    barrier.known = barrier.over = Known(w.known.clock.size());
  });
  return Flow::next;
}

Flow arrive(Warp& w, const Instruction& i, uint32_t lanes) {
  for_each_lane(lanes, [&](int lane) {
    PhaseBarrier& barrier = phase_barrier(w, i, 1, lane);
    if (!barrier.count) fail("a barrier that was not initialized");
    barrier.known.join(w.known);
    if (--barrier.pending == 0) {
      barrier.pending = barrier.count;
      barrier.over = barrier.known;
      ++barrier.phase;
    }
  });
  w.tick();
  return Flow::next;
}

// Whether the phase of a parity is over. What waits in a loop lets others run.
Flow try_wait(Warp& w, const Instruction& i, uint32_t lanes) {
  bool all = true;
  for_each_lane(lanes, [&](int lane) {
    PhaseBarrier& barrier = phase_barrier(w, i, 1, lane);
    if (!barrier.count) fail("a barrier that was not initialized");
    const bool over = (barrier.phase & 1) != (w.slot(i, 2)[lane] & 1);
    if (over) w.known.join(barrier.over);
    all &= over;
    w.slot(i, 0)[lane] = over;
  });
  // The instruction may say no and the program asks again; to be asked again later is the same.
  if (!all) return Flow::again;
  ++w.meeting;
  return Flow::next;
}

Flow nothing(Warp&, const Instruction&, uint32_t) { return Flow::next; }

Flow publish(Warp& w, const Instruction&, uint32_t lanes) {
  if (!together(w, 0xFFFFFFFF, lanes)) fail("a fence of some lanes of a warp");
  join(w.known.fenced, w.known.clock);
  w.tick();
  return Flow::next;
}

Flow await_previous(Warp& w, const Instruction&, uint32_t) {
  w.awaited = true;
  return Flow::next;
}

}  // namespace

Handler warp_of(const std::vector<std::string>& parts, Instruction&) {
  std::string name = parts[0];
  for (size_t i = 1; i < parts.size(); ++i) name += "." + parts[i];
  if (name == "shfl.sync.idx.b32") return shuffle<Shuffle::index>;
  if (name == "shfl.sync.bfly.b32") return shuffle<Shuffle::butterfly>;
  if (name == "redux.sync.max.u32") return reduce_max<uint32_t>;
  if (name == "redux.sync.max.s32") return reduce_max<int32_t>;
  if (name == "redux.sync.add.s32") return reduce_sum;
  if (name == "bar.warp.sync") return warp_barrier;
  if (name == "bar.sync" || name == "barrier.sync") return block_barrier;
  if (name == "mbarrier.init.shared::cta.b64") return initialize;
  if (name == "mbarrier.arrive.shared::cta.b64") return arrive;
  if (name == "mbarrier.try_wait.parity.shared::cta.b64") return try_wait;
  if (name == "fence.mbarrier_init.release.cluster") return nothing;
  if (name == "fence.proxy.async.shared::cta") return publish;
  if (name == "griddepcontrol.wait") return await_previous;
  if (name == "griddepcontrol.launch_dependents") return nothing;
  return nullptr;
}

}  // namespace ptx
