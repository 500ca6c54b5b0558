// Tensor cores: mma, wgmma, and the loads and stores of their fragments, as the PTX manual lays them out.
//
// Sums are taken as coarsely as GPUs may: see add_products. What wgmma reads, in shared memory and registers,
// is compared with what is there when it is waited for: it may be read at any time between. Its sums are
// there at once, as the compiler moves registers that it has asked for, not yet got.
#include <algorithm>

#include "halves.h"
#include "operations.h"

namespace ptx {
namespace {

// Of a 16 x 16 fragment in four registers of two halves each.
int a_row(int lane, int reg) { return lane / 4 + reg % 2 * 8; }
int a_col(int lane, int reg, int half) { return lane % 4 * 2 + reg / 2 * 8 + half; }
// Of a sum's, 16 x 8 in four registers.
int c_row(int lane, int reg) { return lane / 4 + reg / 2 * 8; }
int c_col(int lane, int reg) { return lane % 4 * 2 + reg % 2; }

using Fragment = double[16][16];

template <class Act>
void for_each_sum(const Act& act) {
  for (int reg = 0; reg < 4; ++reg)
    for (int lane = 0; lane < kLanes; ++lane) act(reg, lane, c_row(lane, reg), c_col(lane, reg));
}

double cut_off(double value) {
  const float nearest = float(value);
  return std::fabs(double{nearest}) > std::fabs(value) ? std::nextafter(nearest, 0.0f) : nearest;
}

// sum + a * b for a row of a and eight columns of b, [16][8]: exact products, eight at a time, with the sum
// before them cut off to the 24 bits of the largest of the nine; so is their sum. Measured were 8 at a time
// and a bit more on an A100, 16 and two more on an H100 (Fasi et al. 2021, doi:10.7717/peerj-cs.330; Khattak
// & Mikaitis 2025, arXiv:2512.07004). Sums of integers below 2^24 are exact in all of them.
void add_products(const double (&a)[16], const double* b, double (&sum)[8]) {
  for (int first = 0; first < 16; first += 8) {
    double term[9][8], most[8], all[8];
    for (int col = 0; col < 8; ++col) {
      all[col] = term[8][col] = sum[col];
      most[col] = std::fabs(sum[col]);
    }
    for (int k = 0; k < 8; ++k)
      for (int col = 0; col < 8; ++col) {
        all[col] += term[k][col] = a[first + k] * b[8 * (first + k) + col];
        most[col] = std::max(most[col], std::fabs(term[k][col]));
      }
    int32_t units[8] = {};
    double unit[8], inverse[8];
    bool finite[8];  // of each column: what is not concerns no other
    for (int col = 0; col < 8; ++col) {
      finite[col] = std::isfinite(all[col]);
      // Not a subnormal number's, whose inverse would be none.
      const int64_t exponent = std::max<int64_t>(std::bit_cast<int64_t>(most[col]) >> 52, 100);
      unit[col] = std::bit_cast<double>((exponent - 23) << 52);
      inverse[col] = 1 / unit[col];
    }
    for (int k = 0; k < 9; ++k)
      for (int col = 0; col < 8; ++col)
        units[col] += int32_t(finite[col] ? term[k][col] * inverse[col] : 0);
    for (int col = 0; col < 8; ++col) sum[col] = finite[col] ? cut_off(units[col] * unit[col]) : all[col];
  }
}

void multiply(const Fragment& a, const double* b, double (&sum)[16][8]) {
  for (int row = 0; row < 16; ++row) add_products(a[row], b, sum[row]);
}

template <Half format>
void read_a(Warp& w, const Instruction& i, int operand, Fragment& a) {
  for (int reg = 0; reg < 4; ++reg)
    for (int lane = 0; lane < kLanes; ++lane)
      for (int half = 0; half < 2; ++half)
        a[a_row(lane, reg)][a_col(lane, reg, half)] =
            value_of<format>(uint32_t(w.slot(i, operand, reg)[lane] >> 16 * half));
}

template <Half format>
Flow mma(Warp& w, const Instruction& i, uint32_t lanes) {
  if (lanes != 0xFFFFFFFF) return Flow::apart;
  Fragment a;
  double b[128];  // [k][column]
  read_a<format>(w, i, 1, a);
  for (int reg = 0; reg < 2; ++reg)
    for (int lane = 0; lane < kLanes; ++lane)
      for (int half = 0; half < 2; ++half)
        b[8 * (lane % 4 * 2 + reg * 8 + half) + lane / 4] =
            value_of<format>(uint32_t(w.slot(i, 2, reg)[lane] >> 16 * half));
  double sum[16][8];
  for_each_sum(
      [&](int reg, int lane, int row, int col) { sum[row][col] = get<float>(w.slot(i, 3, reg)[lane]); });
  multiply(a, b, sum);
  for_each_sum(
      [&](int reg, int lane, int row, int col) { set(w.slot(i, 0, reg)[lane], float(sum[row][col])); });
  return Flow::next;
}

// u8 times s8 in s32: byte i of register h of b is k = 16h + 4t + i, of registers 2h and 2h + 1 of a too.
Flow mma_bytes(Warp& w, const Instruction& i, uint32_t lanes) {
  if (lanes != 0xFFFFFFFF) return Flow::apart;
  uint8_t a[16][32];
  int8_t b[8][32];
  for (int lane = 0; lane < kLanes; ++lane)
    for (int k = 0; k < 8; ++k) {
      const int at = k / 4 * 16 + lane % 4 * 4 + k % 4, bit = k % 4 * 8;
      b[lane / 4][at] = int8_t(w.slot(i, 2, k / 4)[lane] >> bit);
      for (int half = 0; half < 2; ++half)
        a[lane / 4 + 8 * half][at] = uint8_t(w.slot(i, 1, k / 4 * 2 + half)[lane] >> bit);
    }
  uint32_t sum[16][8];
  for_each_sum([&](int reg, int lane, int row, int col) {
    sum[row][col] = uint32_t(w.slot(i, 3, reg)[lane]);
    for (int k = 0; k < 32; ++k) sum[row][col] += uint32_t(a[row][k] * b[col][k]);
  });
  for_each_sum([&](int reg, int lane, int row, int col) { w.slot(i, 0, reg)[lane] = sum[row][col]; });
  return Flow::next;
}

// Where an element of an operand lies in shared memory: `strided` counts along rows or columns of the
// product, k along the reduction; `transposed` tells that not k is contiguous.
struct Descriptor {
  uint64_t bits;
  bool transposed;

  int64_t field(int bit) const { return int64_t(bits >> bit & 0x3FFF) << 4; }
  int64_t address_of(int strided, int k) const {
    const int64_t start = field(0), leading = field(16), stride = field(32);
    const int mode = int(bits >> 62);  // 0: none, 1: 128, 2: 64, 3: 32 bytes are swizzled
    if (bits >> 49 & 7) fail("a matrix descriptor with a base offset");
    if (mode == 0) {
      if (!transposed) return start + strided / 8 * stride + k / 8 * leading + strided % 8 * 16 + k % 8 * 2;
      return start + strided / 8 * stride + k / 8 * leading + k % 8 * 16 + strided % 8 * 2;
    }
    const int64_t width = 256 >> mode;
    int64_t at = start;
    if (!transposed)
      at += strided / 8 * stride + strided % 8 * width + k * 2;
    else
      at += strided * 2 / width * leading + k / 8 * stride + k % 8 * width + strided * 2 % width;
    return at ^ ((at >> 7 & ((width >> 4) - 1)) << 4);
  }
};

Warpgroup& warpgroup(Warp& w) { return w.block.warpgroups[w.index / 4]; }

// All four warps of a warpgroup come to an instruction; the last one acts for all.
template <class Act>
Flow of_all(Warp& w, uint32_t lanes, const Act& act) {
  if (lanes != 0xFFFFFFFF) return Flow::apart;
  Warpgroup& group = warpgroup(w);
  if (w.joined == 0) {
    w.joined = 1 + int(group.round & 1);
    if (++group.asked == 4) {
      act(group);
      group.asked = 0;
      ++group.round;
    }
  }
  if (w.joined == 1 + int(group.round & 1)) return Flow::again;
  w.joined = 0;
  return Flow::next;
}

// The four warps of this one's group.
Warp& member(Warp& w, int which) { return w.block.warps[w.index / 4 * 4 + which]; }

template <Half format>
Flow wgmma(Warp& w, const Instruction& i, uint32_t lanes) {
  return of_all(w, lanes, [&](Warpgroup& group) {
    if (!group.fenced) fail("wgmma without a fence before it");
    const int tiles = i.extra;
    const bool in_registers = i.count(1) == 4;
    // Operands after B: whether to add, signs, then which way shared operands lie.
    const auto said = [&](int operand) { return int32_t(*w.slot(i, operand)); };
    if (said(4) != 1 || said(5) != 1) fail("wgmma with a sign");
    const bool add = *w.slot(i, 3) & 1;
    const Descriptor b{*w.slot(i, 2), said(int(i.operands.size()) - 1) != 0};
    const auto read = [&](const Descriptor& of, int strided, int k) {
      const uint32_t at = uint32_t(of.address_of(strided, k));
      const unsigned char* from = w.block.shared(at, 2, 2);
      const int64_t offset = int64_t(at) - kSharedAddress;
      for (int which = 0; which < 4; ++which) w.block.accesses.read_by_wgmma(member(w, which), offset);
      uint16_t bits;
      std::memcpy(&bits, from, 2);
      group.group.memory.push_back({offset, bits});
      return value_of<format>(bits);
    };
    std::vector<double> right(16 * 8 * tiles);  // [tile][k][column]
    for (int n = 0; n < 8 * tiles; ++n)
      for (int k = 0; k < 16; ++k) right[n / 8 * 128 + 8 * k + n % 8] = read(b, n, k);
    for (int which = 0; which < 4; ++which) {
      Warp& one = member(w, which);
      Fragment a;
      if (in_registers) {
        read_a<format>(one, i, 1, a);
        for (int reg = 0; reg < 4; ++reg)
          for (int lane = 0; lane < kLanes; ++lane) {
            const uint64_t& held = one.slot(i, 1, reg)[lane];
            group.group.registers.push_back({&held, held});
          }
      } else {
        const Descriptor left{*w.slot(i, 1), said(int(i.operands.size()) - 2) != 0};
        for (int row = 0; row < 16; ++row)
          for (int k = 0; k < 16; ++k) a[row][k] = read(left, 16 * which + row, k);
      }
      for (int tile = 0; tile < tiles; ++tile) {
        double sum[16][8] = {};
        if (add)
          for_each_sum([&](int reg, int lane, int row, int col) {
            sum[row][col] = get<float>(one.slot(i, 0, 4 * tile + reg)[lane]);
          });
        multiply(a, &right[128 * tile], sum);
        for_each_sum([&](int reg, int lane, int row, int col) {
          set(one.slot(i, 0, 4 * tile + reg)[lane], float(sum[row][col]));
        });
      }
    }
  });
}

Flow wgmma_fence(Warp& w, const Instruction&, uint32_t lanes) {
  return of_all(w, lanes, [](Warpgroup& group) { group.fenced = true; });
}

Flow wgmma_commit(Warp& w, const Instruction&, uint32_t lanes) {
  return of_all(w, lanes, [](Warpgroup& group) {
    group.at_work.push_back(std::move(group.group));
    group.group = {};
    group.fenced = false;
  });
}

Flow wgmma_wait(Warp& w, const Instruction& i, uint32_t lanes) {
  return of_all(w, lanes, [&](Warpgroup& group) {
    const size_t most = size_t(*w.slot(i, 0));
    const auto* memory = reinterpret_cast<const unsigned char*>(w.block.words.data());
    for (; group.at_work.size() > most; group.at_work.pop_front()) {
      for (const RegisterReading& one : group.at_work.front().registers)
        if (*one.at != one.value) fail("registers that wgmma reads changed while it was at work");
      for (const Reading& one : group.at_work.front().memory) {
        if (std::memcmp(memory + one.at, &one.bits, 2) != 0)
          fail("what wgmma reads changed while it was at work");
        for (int which = 0; which < 4; ++which) w.block.accesses.still_read(member(w, which), one.at);
      }
    }
  });
}

// Lane 8 * matrix + row has the address of a row of eight halves; the lanes of a matrix hold pairs.
template <bool transposed>
Flow load_matrices(Warp& w, const Instruction& i, uint32_t lanes) {
  if (lanes != 0xFFFFFFFF) return Flow::apart;
  for (int matrix = 0; matrix < i.count(0); ++matrix) {
    uint16_t all[8][8];
    for (int row = 0; row < 8; ++row) {
      const int lane = 8 * matrix + row;
      const uint32_t at = uint32_t(w.slot(i, 1)[lane] + i.operands[1].offset);
      std::memcpy(all[row], w.block.read(w, lane, at, 16), 16);
    }
    for (int lane = 0; lane < kLanes; ++lane) {
      const int row = lane / 4, col = lane % 4 * 2;
      const uint32_t low = transposed ? all[col][row] : all[row][col];
      const uint32_t high = transposed ? all[col + 1][row] : all[row][col + 1];
      w.slot(i, 0, matrix)[lane] = high << 16 | low;
    }
  }
  return Flow::next;
}

template <bool transposed>
Flow store_matrices(Warp& w, const Instruction& i, uint32_t lanes) {
  if (lanes != 0xFFFFFFFF) return Flow::apart;
  for (int matrix = 0; matrix < i.count(1); ++matrix) {
    uint16_t all[8][8];
    for (int lane = 0; lane < kLanes; ++lane)
      for (int half = 0; half < 2; ++half) {
        const int row = lane / 4, col = lane % 4 * 2 + half;
        (transposed ? all[col][row] : all[row][col]) = uint16_t(w.slot(i, 1, matrix)[lane] >> 16 * half);
      }
    for (int row = 0; row < 8; ++row) {
      const int lane = 8 * matrix + row;
      const uint32_t at = uint32_t(w.slot(i, 0)[lane] + i.operands[0].offset);
      w.block.write(w, lane, at, all[row], 16);
    }
  }
  return Flow::next;
}

}  // namespace

Handler tensor_of(const std::vector<std::string>& parts, Instruction& instruction) {
  const auto has = [&](const char* word) {
    return std::find(parts.begin(), parts.end(), word) != parts.end();
  };
  const std::string& name = parts[0];
  const bool half = parts.back() == "f16" || has("f16");
  if (name == "mma" && has("m16n8k16") && has("row") && has("col") && parts.back() == "f32")
    return half ? mma<Half::float16> : mma<Half::bfloat16>;
  const bool bytes = parts.size() == 10 && parts[6] == "s32" && parts[7] == "u8" && parts[8] == "s8";
  if (name == "mma" && has("m16n8k32") && has("row") && has("col") && bytes) return mma_bytes;
  if (name == "wgmma" && parts[1] == "fence") return wgmma_fence;
  if (name == "wgmma" && parts[1] == "commit_group") return wgmma_commit;
  if (name == "wgmma" && parts[1] == "wait_group") return wgmma_wait;
  if (name == "wgmma" && parts[1] == "mma_async" && parts.size() == 8 && parts[5] == "f32") {
    instruction.extra = instruction.count(0) / 4;
    if (parts[4] != "m64n" + std::to_string(8 * instruction.extra) + "k16") return nullptr;
    return half ? wgmma<Half::float16> : wgmma<Half::bfloat16>;
  }
  if (name == "ldmatrix" && parts.back() == "b16" && has("m8n8"))
    return has("trans") ? load_matrices<true> : load_matrices<false>;
  if (name == "stmatrix" && parts.back() == "b16" && has("m8n8"))
    return has("trans") ? store_matrices<true> : store_matrices<false>;
  return nullptr;
}

Handler handler_of(const std::vector<std::string>& parts, Instruction& instruction) {
  for (const auto of : {arithmetic_of, memory_of, warp_of, tensor_of})
    if (const Handler found = of(parts, instruction)) return found;
  return nullptr;
}

}  // namespace ptx
