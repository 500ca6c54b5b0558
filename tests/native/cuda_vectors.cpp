// Reads tests/vectors.txt and holds the CUDA kernels' hash and decode to every dense line of it: the patch of
// the element goes into A's registers, both ways, and each register's two halves, as bfloat16 and as float16,
// must be the codes, in their unit, of the elements that fragment.h says they are; and the sums of its bytes
// and of the next patch's times integers, those of the fields. Prints the number of lines.
#include <fstream>
#include <iostream>
#include <sstream>
#include <string>

#include "../../csrc/cuda/bytes.h"
#include "../../csrc/cuda/hash.h"

namespace {

using namespace nmkern;
using namespace nmkern::cuda;

constexpr NormalTable kTable = normal_table();

// The number of times that (row, field) of the patch stands in A with this code; -1 where a code is wrong.
template <class Patch, Dtype kOperand>
int occurrences_of(Words words, int first_field, int row, int field, int code) {
  constexpr int kBits = 32 / Patch::kColumns;
  const Words drawn = words;
  for (uint32_t& word : words.w) word >>= first_field * kBits;
  const auto lookup = [](uint32_t word, int at) {
    const uint32_t lane_bytes = 31 * 4;  // the last lane
    const uint32_t offset = table_offset(word, at, lane_bytes);
    return offset % kEntryBytes == lane_bytes ? kTable.code<kOperand>(offset / kEntryBytes) : 0xFFFF;
  };
  int found = 0;
  for (int tile = 0; tile < Patch::kTiles; ++tile)
    for (int depth = 0; depth < Patch::kDepth; ++depth)
      for (int reg = 0; reg < 4; ++reg) {
        const uint32_t pair = a_register<Patch, kOperand>(words, tile, depth, reg, lookup);
        for (int e = 0; e < 2; ++e) {
          const int output = Patch::output(tile, reg & 1);
          const int reduction = Patch::reduction(depth, reg >> 1, e);
          const int r = Patch::kTransposed ? reduction : output;
          const int f = Patch::kTransposed ? first_field + output : reduction;
          const uint32_t bits = drawn.w[r] >> (f * kBits) & ((1u << kBits) - 1);
          const auto half = uint16_t(pair >> 16 * e);
          const float value = (kOperand == Dtype::float16 ? from_float16(half) : from_bfloat16(half)) /
                              unit<Patch::kFamily, kOperand>();
          if (value != float(decode(Patch::kFamily, bits))) return -1;
          if (r == row && f == field && value == float(code)) ++found;
        }
      }
  return found;
}

// The same of both dtypes; -1 where they differ too.
template <class Patch>
int occurrences(const Words& words, int first_field, int row, int field, int code) {
  const int found = occurrences_of<Patch, Dtype::bfloat16>(words, first_field, row, field, code);
  return found == occurrences_of<Patch, Dtype::float16>(words, first_field, row, field, code) ? found : -1;
}

template <Family family, int fields>
int in_slices(const Words& words, int row, int field, int code) {
  int found = 0;
  for (int first = 0; first < columns_per_word(family); first += fields)
    found += occurrences<PatchLayout<family, true, fields>>(words, first, row, field, code);
  return found;
}

template <Family family, bool transposed>
bool sums_are_of_fields(uint32_t c0, uint32_t c1, Key key) {
  using Bytes = PatchBytes<family, transposed>;
  constexpr int kColumns = columns_per_word(family), kBits = 32 / kColumns;
  const RoundKeys keys = round_keys(key, family);
  Words words[Bytes::kPatches], bytes[Bytes::kPatches];
  for (int i = 0; i < Bytes::kPatches; ++i) {
    words[i] = patch(row_part(c1 + i * transposed, keys), column_part(c0 + i * !transposed, keys), keys);
    bytes[i] = transposed ? transposed_bytes(words[i]) : words[i];
  }
  int q[Bytes::kSlots];
  for (int slot = 0; slot < Bytes::kSlots; ++slot) q[slot] = (slot * 7919 + int(c0 & 1023)) % 2003 - 1001;
  const auto sum = [&](int output, int set) {
    int total = 0;
    for (int reg = set * 2 * Bytes::kPairs; reg < (set + 1) * 2 * Bytes::kPairs; ++reg) {
      const uint32_t a = Bytes::bytes(bytes, set, reg / 2 % Bytes::kPairs, reg % 2, output);
      for (int i = 0; i < 4; ++i) total += int(a >> 8 * i & 0xFF) * Bytes::scaled(q, Bytes::slot(reg, i));
    }
    return total;
  };
  for (int output = 0; output < (transposed ? kColumns : kRowsPerPatch); ++output) {
    int want = 0;
    for (int slot = 0; slot < Bytes::kSlots; ++slot) {
      const int per = Bytes::kSlots / Bytes::kPatches, at = slot % per;
      const uint32_t word = words[slot / per].w[transposed ? at : output];
      want += q[slot] * int(word >> (transposed ? output : at) * kBits & ((1u << kBits) - 1));
    }
    if (Bytes::field_sum(sum, output) != want << Bytes::kShift) return false;
  }
  return ByteCode<family>::kFactor * 1 - ByteCode<family>::kOffset == decode(family, 1) &&
         -ByteCode<family>::kOffset == decode(family, 0);
}

template <Family family>
bool check(uint64_t row, uint64_t col, uint32_t word, int code, Key key) {
  constexpr int kColumns = columns_per_word(family);
  const RoundKeys keys = round_keys(key, family);
  const Words words =
      patch(row_part(uint32_t(row / 4), keys), column_part(uint32_t(col / kColumns), keys), keys);
  const int r = int(row % 4), f = int(col % kColumns);
  if (words.w[r] != word) return false;
  if constexpr (family != Family::normal)
    if (!sums_are_of_fields<family, false>(uint32_t(col / kColumns), uint32_t(row / 4), key) ||
        !sums_are_of_fields<family, true>(uint32_t(col / kColumns), uint32_t(row / 4), key))
      return false;
  if (occurrences<PatchLayout<family, false>>(words, 0, r, f, code) != 1) return false;
  if (occurrences<PatchLayout<family, true>>(words, 0, r, f, code) != 1) return false;
  if constexpr (family == Family::rademacher)
    return in_slices<family, 16>(words, r, f, code) == 1 && in_slices<family, 8>(words, r, f, code) == 1;
  return true;
}

bool check(const std::string& line) {
  std::istringstream in(line);
  std::string kind, name;
  uint64_t seed, row, col;
  uint32_t word;
  int code;
  in >> kind >> name >> seed >> row >> col >> std::hex >> word >> std::dec >> code;
  const Key key{uint32_t(seed), uint32_t(seed >> 32)};
  if (!in) return false;
  if (name == "rademacher") return check<Family::rademacher>(row, col, word, code, key);
  if (name == "uniform") return check<Family::uniform>(row, col, word, code, key);
  return check<Family::normal>(row, col, word, code, key);
}

}  // namespace

int main(int, char** argv) {
  std::ifstream file(argv[1]);
  std::string line;
  int lines = 0;
  while (std::getline(file, line)) {
    if (line.rfind("dense ", 0) != 0) continue;
    if (!check(line)) {
      std::cout << "differs: " << line << "\n";
      return 1;
    }
    ++lines;
  }
  std::cout << lines << "\n";
}
