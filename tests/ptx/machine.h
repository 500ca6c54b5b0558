// A grid of thread blocks that executes a kernel of program.h: lanes, warps, barriers, shared memory.
//
// Warps run in an order that is drawn, each for as long as is drawn. The lanes of a warp that stand at one
// instruction execute it together; of those that diverged the ones furthest behind go first, so that they
// meet again where their ways do. Registers and shared memory start as NaN.
//
// What a GPU would not forgive is refused: addresses that are not aligned or outside memory, threads that
// wait for each other for ever, and, in shared memory, whatever depends on which thread comes first: accesses
// that no barrier orders (of the lanes of one warp too), and reads by wgmma, which goes another way than
// stores do, of what no fence has published.
#pragma once

#include <array>
#include <bit>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <random>

#include "program.h"

namespace ptx {

using Clock = std::vector<uint32_t>;  // of each warp, what happened before

inline void join(Clock& to, const Clock& from) {
  for (size_t i = 0; i < to.size(); ++i) to[i] = std::max(to[i], from[i]);
}

// Who wrote and who read shared memory, and when, for each two bytes. Of the threads that read within one
// warp only those of the last warp are known.
class Accesses {
 public:
  Accesses(int64_t bytes, int warps)
      : warps_(warps),
        units_(static_cast<Unit*>(std::calloc(bytes / 2 + 1, sizeof(Unit)))),
        read_(static_cast<uint32_t*>(std::calloc((bytes / 2 + 1) * warps, sizeof(uint32_t)))) {}
  void read(const Warp& warp, int lane, int64_t at, int bytes) { read_by(warp, lane, at, bytes, false); }
  void read_by_wgmma(const Warp& warp, int64_t at) { read_by(warp, 0, at, 2, true); }
  void still_read(const Warp& warp, int64_t at);
  // What is there already may be written by anyone, at any time.
  void write(const Warp& warp, int lane, int64_t at, int bytes, const unsigned char* before,
             const unsigned char* after);

 private:
  struct Unit {
    uint32_t written, meeting;  // by the clock of its warp; 0: never
    uint16_t warp, lane;
    uint32_t also;  // warps that wrote the same
    uint32_t readers, reader_meeting;
    uint16_t reader, bytes;  // of the unit that were written: 1, 2 or both
  };
  struct Free {
    void operator()(void* at) const { std::free(at); }
  };
  int warps_;
  std::unique_ptr<Unit[], Free> units_;
  std::unique_ptr<uint32_t[], Free> read_;  // [unit, warp]: its clock
  void read_by(const Warp& warp, int lane, int64_t at, int bytes, bool wgmma);
};

// What a warp knows to have happened, and what of it wgmma may read: what came before a fence between the two
// ways to shared memory, whoever made it.
struct Known {
  Clock clock, fenced;
  explicit Known(size_t warps = 0) : clock(warps), fenced(warps) {}
  void join(const Known& other) {
    ptx::join(clock, other.clock);
    ptx::join(fenced, other.fenced);
  }
};

struct Barrier {
  int arrived = 0;
  uint32_t round = 0;
  Known known, over;  // of those that have arrived, and of the last round
};

// Of mbarrier: its state lies here, and its address is its name.
struct PhaseBarrier {
  int count = 0, pending = 0;
  uint32_t phase = 0;
  Known known, over;
};

// Shared memory and registers that wgmma reads while it is at work: they must not change.
struct Reading {
  int64_t at;
  uint16_t bits;
};
struct RegisterReading {
  const uint64_t* at;
  uint64_t value;
};
struct InFlight {
  std::vector<Reading> memory;
  std::vector<RegisterReading> registers;
};

struct Warpgroup {
  int asked = 0;  // warps that have come to an instruction of all
  uint32_t round = 0;
  bool fenced = false;
  InFlight group;
  std::deque<InFlight> at_work;
};

struct Copy {
  int64_t to;
  std::array<unsigned char, 16> bytes;
  int count;
};

struct Block;

struct Warp {
  struct Group {
    int at;
    uint32_t lanes;
    bool apart = false;  // stands where lanes that are elsewhere have to come
    Barrier* barrier = nullptr;
    uint32_t round = 0;
  };

  Block& block;
  const Kernel& kernel;
  int index;
  std::vector<uint64_t> registers;
  std::vector<Group> groups;
  Known known;
  uint32_t meeting = 1;  // of its lanes
  bool awaited = false;  // the kernels before it
  int joined = 0;        // what of a Warpgroup's rounds it has taken part in
  std::array<std::vector<std::vector<Copy>>, kLanes> copies;  // asynchronous, by group; the last is open

  Warp(Block& block, int index);
  uint64_t* slot(const Instruction& i, int operand, int which = 0) {
    return &registers[size_t(i.slot(operand, which)) * kLanes];
  }
  uint32_t live() const {
    uint32_t lanes = 0;
    for (const Group& one : groups) lanes |= one.lanes;
    return lanes;
  }
  // Executes some instructions; whether it got anywhere.
  bool run(int most);
  void tick() { ++known.clock[index]; }
  uint32_t now() const { return known.clock[index]; }

 private:
  const Instruction* executing = nullptr;
  Group* next();
  void merge();
};

// Memory of the device's: bytes from each address on.
using Memory = std::map<uint64_t, uint64_t>;

inline bool is_within(const Memory& memory, uint64_t at, int bytes) {
  const auto after = memory.upper_bound(at);
  if (after == memory.begin()) return false;
  const auto& [first, size] = *std::prev(after);
  return at + bytes <= first + size;
}

struct Launch {
  const Kernel& kernel;
  std::array<uint32_t, 3> grid, threads;
  int64_t shared_bytes = 0;  // beside the kernel's own
  std::vector<unsigned char> parameters;
  bool overlaps = false;           // begins before the kernels before it have ended
  const Memory* memory = nullptr;  // all that the kernel may touch; null: anything
};

struct Block {
  const Launch& launch;
  std::array<uint32_t, 3> index;
  std::vector<uint64_t> words;
  int64_t shared_bytes;
  Accesses accesses;
  std::array<Barrier, 16> barriers;
  std::map<int64_t, PhaseBarrier> phase_barriers;
  std::vector<Warpgroup> warpgroups;
  std::deque<Warp> warps;

  Block(const Launch& launch, std::array<uint32_t, 3> index);
  void run();

  // Of `bytes` at an address within shared memory, aligned to as many.
  unsigned char* shared(uint32_t address, int bytes, int align) {
    const int64_t at = int64_t{address} - kSharedAddress;
    if (at < 0 || at + bytes > shared_bytes) fail("shared memory at " + std::to_string(at) + ": outside");
    if (address % align) fail("shared memory at " + std::to_string(at) + ": not aligned");
    return reinterpret_cast<unsigned char*>(words.data()) + at;
  }
  // By a lane, at an address; who comes first must not matter.
  const unsigned char* read(const Warp& warp, int lane, uint32_t address, int bytes) {
    const unsigned char* found = shared(address, bytes, bytes);
    accesses.read(warp, lane, int64_t{address} - kSharedAddress, bytes);
    return found;
  }
  void write(const Warp& warp, int lane, uint32_t address, const void* value, int bytes) {
    unsigned char* to = shared(address, bytes, bytes);
    accesses.write(warp, lane, int64_t{address} - kSharedAddress, bytes, to,
                   static_cast<const unsigned char*>(value));
    std::memcpy(to, value, bytes);
  }
  int live_threads() const;
};

// Blocks run side by side, on all cores.
void run_grid(const Launch& launch);

template <class Do>
inline void for_each_lane(uint32_t lanes, const Do& act) {
  if (lanes == 0xFFFFFFFF)
    for (int lane = 0; lane < kLanes; ++lane) act(lane);
  else
    for (; lanes; lanes &= lanes - 1) act(std::countr_zero(lanes));
}

}  // namespace ptx
