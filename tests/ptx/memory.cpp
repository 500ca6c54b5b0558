// Loads and stores, atomics, copies that run by themselves. Memory that kernels share is the host's own.
#include <algorithm>
#include <atomic>

#include "operations.h"

namespace ptx {
namespace {

enum class Space { global, shared, parameter };

uint64_t address(Warp& w, const Instruction& i, int operand, int lane) {
  return w.slot(i, operand)[lane] + i.operands[operand].offset;
}

unsigned char* global(Warp& w, uint64_t at, int bytes) {
  if (at % bytes) fail("memory is not aligned to " + std::to_string(bytes));
  for (const auto& [first, size] : w.kernel.globals)  // are there before any kernel
    if (at >= first && at + bytes <= first + size) return reinterpret_cast<unsigned char*>(at);
  if (w.block.launch.overlaps && !w.awaited) fail("memory before griddepcontrol.wait");
  if (const Memory* all = w.block.launch.memory; all && !is_within(*all, at, bytes)) {
    const auto after = all->upper_bound(at);
    fail("an address outside memory" + (after == all->begin()
                                            ? ""
                                            : ": byte " + std::to_string(at - std::prev(after)->first) +
                                                  " of " + std::to_string(std::prev(after)->second)));
  }
  return reinterpret_cast<unsigned char*>(at);
}

const unsigned char* source(Warp& w, Space space, uint64_t at, int lane, int bytes) {
  if (space == Space::global) return global(w, at, bytes);
  if (space == Space::parameter) return w.block.launch.parameters.data() + at;
  return w.block.read(w, lane, uint32_t(at), bytes);
}

template <class T, Space space>
Flow load(Warp& w, const Instruction& i, uint32_t lanes) {
  const int count = i.count(0);
  for_each_lane(lanes, [&](int lane) {
    const unsigned char* from = source(w, space, address(w, i, 1, lane), lane, count * int(sizeof(T)));
    T values[4];
    std::memcpy(values, from, count * sizeof(T));
    for (int k = 0; k < count; ++k) {
      if constexpr (std::is_signed_v<T> && std::is_integral_v<T>)
        w.slot(i, 0, k)[lane] = uint64_t(int64_t(values[k]));
      else
        set(w.slot(i, 0, k)[lane], values[k]);
    }
  });
  return Flow::next;
}

template <class T, Space space>
Flow store(Warp& w, const Instruction& i, uint32_t lanes) {
  const int count = i.count(1);
  for_each_lane(lanes, [&](int lane) {
    T values[4];
    for (int k = 0; k < count; ++k) values[k] = get<T>(w.slot(i, 1, k)[lane]);
    const uint64_t to = address(w, i, 0, lane);
    const int bytes = count * int(sizeof(T));
    if constexpr (space == Space::shared)
      w.block.write(w, lane, uint32_t(to), values, bytes);
    else
      std::memcpy(global(w, to, bytes), values, bytes);
  });
  return Flow::next;
}

enum class Atomic { add, bits, most };

template <Space space, Atomic kind>
Flow atomic(Warp& w, const Instruction& i, uint32_t lanes) {
  const int at = i.operands.size() == 3;  // the first operand is what was there
  for_each_lane(lanes, [&](int lane) {
    const uint64_t where = address(w, i, at, lane);
    // Atomics of several threads are no race.
    unsigned char* to = space == Space::global ? global(w, where, 4) : w.block.shared(uint32_t(where), 4, 4);
    const std::atomic_ref<uint32_t> there(*reinterpret_cast<uint32_t*>(to));
    const uint32_t value = get<uint32_t>(w.slot(i, at + 1)[lane]);
    uint32_t old = there;
    if constexpr (kind == Atomic::add) old = there.fetch_add(value);
    if constexpr (kind == Atomic::bits) old = there.fetch_or(value);
    if constexpr (kind == Atomic::most)
      while (!there.compare_exchange_weak(old, std::max(old, value))) {
      }
    if (at) set(w.slot(i, 0)[lane], old);
  });
  return Flow::next;
}

Handler atomic_of(const std::vector<std::string>& parts) {
  const auto has = [&](const char* word) {
    return std::find(parts.begin(), parts.end(), word) != parts.end();
  };
  if (parts.back() != "u32" && parts.back() != "b32") return nullptr;
  const bool shared = has("shared");
  if (shared == has("global")) return nullptr;
  if (has("add")) return shared ? atomic<Space::shared, Atomic::add> : atomic<Space::global, Atomic::add>;
  if (has("or")) return shared ? atomic<Space::shared, Atomic::bits> : atomic<Space::global, Atomic::bits>;
  if (has("max")) return shared ? atomic<Space::shared, Atomic::most> : atomic<Space::global, Atomic::most>;
  return nullptr;
}

// Nobody can tell when the copy arrives: its source is read at once, its destination is NaN until it is
// waited for.
Flow copy(Warp& w, const Instruction& i, uint32_t lanes) {
  for_each_lane(lanes, [&](int lane) {
    const int bytes = int(w.slot(i, 2)[lane]);
    const int given = i.operands.size() > 3 ? int(get<uint32_t>(w.slot(i, 3)[lane])) : bytes;
    const uint64_t to = address(w, i, 0, lane), from = address(w, i, 1, lane);
    Copy made{int64_t(to), {}, bytes};
    if (given > 0) {
      if (from % bytes) fail("memory is not aligned to " + std::to_string(bytes));
      std::memcpy(made.bytes.data(), global(w, from, given), given);
    }
    unsigned char nothing[16];
    std::memset(nothing, 0xFF, 16);
    w.block.write(w, lane, uint32_t(to), nothing, bytes);
    w.copies[lane].back().push_back(made);
  });
  return Flow::next;
}

Flow commit_copies(Warp& w, const Instruction&, uint32_t lanes) {
  for_each_lane(lanes, [&](int lane) { w.copies[lane].emplace_back(); });
  return Flow::next;
}

Flow await_copies(Warp& w, const Instruction& i, uint32_t lanes) {
  const size_t most = i.operands.empty() ? 0 : size_t(*w.slot(i, 0));
  for_each_lane(lanes, [&](int lane) {
    auto& groups = w.copies[lane];
    while (groups.size() - 1 > most) {
      for (const Copy& one : groups.front())
        w.block.write(w, lane, uint32_t(one.to), one.bytes.data(), one.count);
      groups.erase(groups.begin());
    }
  });
  return Flow::next;
}

}  // namespace

Handler memory_of(const std::vector<std::string>& parts, Instruction& instruction) {
  const std::string& name = parts[0];
  if (name == "atom" || name == "red") return atomic_of(parts);
  if (name == "cp" && parts.size() > 2 && parts[1] == "async") {
    if (parts[2] == "commit_group") return commit_copies;
    if (parts[2] == "wait_group") return await_copies;
    return parts.size() == 5 && parts[3] == "shared" && parts[4] == "global" ? copy : nullptr;
  }
  if ((name != "ld" && name != "st") || parts.size() < 3) return nullptr;
  if (instruction.count(name == "ld" ? 0 : 1) > 4) return nullptr;
  const std::string& space = parts[1];
  return with_type(parts.back(), [&]<class T>() -> Handler {
    if constexpr (std::is_same_v<T, bool>) {
      return nullptr;
    } else {
      if (name == "ld" && space == "global") return load<T, Space::global>;
      if (name == "ld" && space == "shared") return load<T, Space::shared>;
      if (name == "ld" && space == "param") return load<T, Space::parameter>;
      if (name == "st" && space == "global") return store<T, Space::global>;
      if (name == "st" && space == "shared") return store<T, Space::shared>;
      return nullptr;
    }
  });
}

}  // namespace ptx
