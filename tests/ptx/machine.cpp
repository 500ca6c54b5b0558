// Warps take turns; see machine.h.
#include "machine.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <thread>

namespace ptx {
namespace {

constexpr uint64_t kNothing = 0xFFFFFFFFFFFFFFFF;  // NaN in every format

uint32_t special_of(const std::string& name, const Block& block, int thread) {
  const auto& [x, y, z] = block.launch.threads;
  const std::array<uint32_t, 3> at{thread % x, thread / x % y, thread / x / y};
  const int axis = name.back() - 'x';
  if (name == "%laneid") return thread % kLanes;
  if (axis < 0 || axis > 2) fail("not known: " + name);
  const std::string what = name.substr(0, name.size() - 2);
  if (what == "%tid") return at[axis];
  if (what == "%ntid") return block.launch.threads[axis];
  if (what == "%ctaid") return block.index[axis];
  if (what == "%nctaid") return block.launch.grid[axis];
  fail("not known: " + name);
}

// The bytes of a unit that an access from `at` on touches: 1, 2 or both.
uint32_t touched(int64_t unit, int64_t at, int bytes) {
  return (2 * unit >= at) | (2 * unit + 1 >= at && 2 * unit + 1 < at + bytes) << 1;
}

[[noreturn]] void refuse(const Warp& warp, const char* what, int64_t unit) {
  fail("a race in shared memory at " + std::to_string(2 * unit) + ": warp " + std::to_string(warp.index) +
       " " + what);
}

}  // namespace

void Accesses::read_by(const Warp& warp, int lane, int64_t at, int bytes, bool wgmma) {
  for (int64_t unit = at / 2; 2 * unit < at + bytes; ++unit) {
    Unit& of = units_[unit];
    if (of.written && (of.bytes & touched(unit, at, bytes)) && !(of.also >> warp.index & 1)) {
      if (of.warp == warp.index ? of.meeting == warp.meeting && of.lane != lane && !wgmma
                                : warp.known.clock[of.warp] < of.written)
        refuse(warp, "reads what may not be written yet", unit);
      if (wgmma && warp.known.fenced[of.warp] < of.written)
        refuse(warp, "multiplies what no fence has published", unit);
    }
    read_[unit * warps_ + warp.index] = warp.now();
    if (wgmma) continue;
    if (of.reader != warp.index || of.reader_meeting != warp.meeting) of.readers = 0;
    of.reader = uint16_t(warp.index);
    of.reader_meeting = warp.meeting;
    of.readers |= 1u << lane;
  }
}

void Accesses::still_read(const Warp& warp, int64_t at) { read_[at / 2 * warps_ + warp.index] = warp.now(); }

void Accesses::write(const Warp& warp, int lane, int64_t at, int bytes, const unsigned char* before,
                     const unsigned char* after) {
  for (int64_t unit = at / 2; 2 * unit < at + bytes; ++unit) {
    Unit& of = units_[unit];
    const uint32_t here = touched(unit, at, bytes);
    const char* race = nullptr;
    if (here == 3) {  // whoever reads a byte may read the other
      if (of.reader == warp.index && of.reader_meeting == warp.meeting && (of.readers & ~(1u << lane)))
        race = "writes what another lane may not have read yet";
      for (int other = 0; other < warps_; ++other)
        if (other != warp.index && warp.known.clock[other] < read_[unit * warps_ + other])
          race = "writes what may not be read yet";
    }
    if (of.written && (of.bytes & here) &&
        (of.warp == warp.index ? of.meeting == warp.meeting && of.lane != lane
                               : warp.known.clock[of.warp] < of.written))
      race = "writes what another writes too";
    if (race) {
      const int64_t first = std::max(2 * unit, at) - at, last = std::min(2 * unit + 2, at + bytes) - at;
      if (std::memcmp(before + first, after + first, last - first) != 0) refuse(warp, race, unit);
      of.also |= 1u << warp.index;
      continue;
    }
    of.written = warp.now();
    of.meeting = warp.meeting;
    of.warp = uint16_t(warp.index);
    of.lane = uint16_t(lane);
    of.bytes = uint16_t(here);
    of.also = 0;
  }
}

Warp::Warp(Block& block, int index)
    : block(block),
      kernel(block.launch.kernel),
      index(index),
      registers(size_t(kernel.slots) * kLanes, kNothing),
      groups{{0, 0xFFFFFFFF}},
      known((block.launch.threads[0] * block.launch.threads[1] * block.launch.threads[2]) / kLanes) {
  tick();
  for (const auto& [slot, value] : kernel.constants)
    std::fill_n(&registers[size_t(slot) * kLanes], kLanes, value);
  for (const auto& [slot, name] : kernel.specials)
    for (int lane = 0; lane < kLanes; ++lane)
      registers[size_t(slot) * kLanes + lane] = special_of(name, block, index * kLanes + lane);
  for (auto& one : copies) one.resize(1);
}

void Warp::merge() {
  for (size_t i = 0; i < groups.size(); ++i)
    for (size_t j = groups.size(); --j > i;)
      if (groups[i].at == groups[j].at && !groups[i].barrier && !groups[j].barrier) {
        groups[i].lanes |= groups[j].lanes;
        groups[i].apart = false;
        groups.erase(groups.begin() + j);
      }
}

Warp::Group* Warp::next() {
  bool released = false;
  for (Group& one : groups)
    if (one.barrier && one.barrier->round != one.round) {
      known.join(one.barrier->over);
      one.barrier = nullptr;
      released = true;
    }
  if (released) {
    ++meeting;
    tick();
    merge();
  }
  Group* found = nullptr;
  bool waits = false;
  for (Group& one : groups) {
    waits |= one.barrier != nullptr;
    if (!one.barrier && !one.apart && (!found || one.at < found->at)) found = &one;
  }
  if (!found && !waits && !groups.empty())
    fail("lanes of a warp do not meet at: " + kernel.code[groups[0].at].text);
  return found;
}

bool Warp::run(int most) try {
  for (int done = 0; done < most; ++done) {
    Group* group = groups.size() == 1 && !groups[0].barrier && !groups[0].apart ? &groups[0] : next();
    if (!group) return done > 0;
    const Instruction& i = kernel.code[group->at];
    executing = &i;
    uint32_t lanes = group->lanes;
    if (i.predicate >= 0) {
      const uint64_t* given = &registers[size_t(i.predicate) * kLanes];
      for_each_lane(group->lanes,
                    [&](int lane) { lanes &= ~(uint32_t((given[lane] & 1) == i.negated) << lane); });
    }
    const Flow flow = lanes ? i.run(*this, i, lanes) : Flow::next;
    if (flow == Flow::again) return done > 0;
    if (flow == Flow::apart) {
      group->apart = true;
      continue;
    }
    if (flow == Flow::next || flow == Flow::wait) {
      ++group->at;
    } else if (lanes == group->lanes) {
      if (flow == Flow::jump)
        group->at = i.target;
      else
        groups.erase(groups.begin() + (group - groups.data()));
    } else {
      group->lanes &= ~lanes;
      ++group->at;
      if (flow == Flow::jump) groups.push_back({i.target, lanes});
    }
    if (groups.size() > 1) merge();
    if (groups.empty()) return true;
  }
  return true;
} catch (const std::exception& error) {
  const auto& [x, y, z] = block.index;
  fail(std::string(error.what()) + "; block " + std::to_string(x) + ", " + std::to_string(y) + ", " +
       std::to_string(z) + ", warp " + std::to_string(index) + ": " + executing->text);
}

Block::Block(const Launch& launch, std::array<uint32_t, 3> index)
    : launch(launch),
      index(index),
      words((launch.kernel.shared_bytes + launch.shared_bytes) / 8 + 1, kNothing),
      shared_bytes(launch.kernel.shared_bytes + launch.shared_bytes),
      accesses(shared_bytes, int(launch.threads[0] * launch.threads[1] * launch.threads[2]) / kLanes) {
  const int threads = int(launch.threads[0] * launch.threads[1] * launch.threads[2]);
  if (threads % kLanes) fail("a block of other than whole warps");
  for (Barrier& one : barriers) one.known = one.over = Known(threads / kLanes);
  for (int warp = 0; warp < threads / kLanes; ++warp) warps.emplace_back(*this, warp);
  warpgroups.resize((warps.size() + 3) / 4);
}

int Block::live_threads() const {
  int count = 0;
  for (const Warp& one : warps) count += std::popcount(one.live());
  return count;
}

void Block::run() {
  std::mt19937 random(index[0] + 7 * index[1] + 31 * index[2]);
  std::vector<Warp*> left;
  for (Warp& one : warps) left.push_back(&one);
  for (int still = 0; !left.empty();) {
    std::shuffle(left.begin(), left.end(), random);
    bool progress = false;
    for (Warp* one : left) progress |= one->run(1 << random() % 12);
    // Those that have ended are no longer waited for: threads of a barrier are counted when one arrives.
    left.erase(std::remove_if(left.begin(), left.end(), [](const Warp* one) { return one->groups.empty(); }),
               left.end());
    still = progress ? 0 : still + 1;
    if (still == 3) fail("threads wait for each other for ever");
  }
}

void run_grid(const Launch& launch) {
  const auto& [x, y, z] = launch.grid;
  std::atomic<uint64_t> next{0};
  std::mutex mutex;
  std::atomic<bool> failed{false};
  std::exception_ptr error;
  const auto work = [&] {
    for (uint64_t one; !failed && (one = next++) < uint64_t{x} * y * z;) try {
        Block(launch, {uint32_t(one % x), uint32_t(one / x % y), uint32_t(one / x / y)}).run();
      } catch (...) {
        const std::lock_guard<std::mutex> lock(mutex);
        error = std::current_exception();
        failed = true;
      }
  };
  std::vector<std::thread> others(std::max(std::thread::hardware_concurrency(), 1u) - 1);
  for (std::thread& one : others) one = std::thread(work);
  work();
  for (std::thread& one : others) one.join();
  if (failed) std::rethrow_exception(error);
}

}  // namespace ptx
